"""From priorities to an order, to an action and back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvenv.ranking import action_from_order, evict, eviction_order, order_from_action

SLOTS = st.integers(1, 12)
COARSE = st.sampled_from([-torch.inf, -2.0, -0.0, 0.0, 1.0, torch.inf])


@st.composite
def heads(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return priorities with ties and infinities, positions in any slot order and a mask (3, C)."""
    slots = draw(SLOTS)
    priorities = torch.tensor(draw(st.lists(st.lists(COARSE, min_size=slots, max_size=slots), min_size=3, max_size=3)))
    positions = torch.tensor([draw(st.permutations(range(-1, 2 * slots)))[:slots] for _ in range(3)])
    wanted = draw(st.lists(st.lists(st.booleans(), min_size=slots, max_size=slots), min_size=3, max_size=3))
    return priorities, positions, torch.tensor(wanted) & (positions >= 0)


@given(heads(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.integers(1, 12))
def test_candidates_go_lowest_first_and_ties_older_first(head: tuple, dtype: torch.dtype, first: int) -> None:
    priorities, positions, mask = head
    priorities, first = priorities.to(dtype), min(first, mask.shape[1])
    order = eviction_order(priorities, positions, mask)
    asked = eviction_order(priorities, positions, mask, first)
    for row in range(3):
        count = min(first, int(mask[row].sum()))
        assert torch.equal(asked[row, :count], order[row, :count])
        candidates = [slot for slot in range(mask.shape[1]) if mask[row, slot]]
        expected = sorted(candidates, key=lambda slot: (float(priorities[row, slot]), int(positions[row, slot])))
        assert order[row, : len(candidates)].tolist() == expected
        assert sorted(order[row].tolist()) == list(range(mask.shape[1])), "every slot once"


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_any_float32_keeps_its_place(numbers: list[float]) -> None:
    priorities, positions = torch.tensor([numbers]), torch.arange(len(numbers))[None]
    order = eviction_order(priorities, positions, torch.ones_like(positions, dtype=torch.bool))
    assert torch.equal(order, priorities.argsort(dim=-1, stable=True))


@given(heads())
def test_non_candidates_values_are_ignored(head: tuple) -> None:
    priorities, positions, mask = head
    wild = torch.where(mask, priorities, torch.nan)
    count = int(mask.sum(-1).min())
    expected = eviction_order(priorities, positions, mask)[:, :count]
    assert torch.equal(eviction_order(wild, positions, mask)[:, :count], expected)


@given(heads())
def test_the_action_gives_the_order_back(head: tuple) -> None:
    priorities, positions, mask = head
    order = eviction_order(priorities, positions, mask)
    action = action_from_order(order, mask)
    assert action.dtype == torch.float32
    assert action.abs().max() <= 1
    assert (action[~mask] == 1).all()
    back = order_from_action(action.clamp(-1, 1), positions, mask.to(torch.int8))
    for row in range(3):
        count = int(mask[row].sum())
        assert torch.equal(back[row, :count], order[row, :count])


def test_neighbouring_ranks_stay_apart_in_float32() -> None:
    slots = 40_000
    order = torch.randperm(slots)
    action = action_from_order(order, torch.ones(slots, dtype=torch.bool))
    assert torch.equal(action.argsort(), order)


@given(heads(), st.lists(st.integers(0, 12), min_size=3, max_size=3), st.integers(1, 12))
def test_evict_empties_the_first_of_the_order(head: tuple, counts: list[int], at_most: int) -> None:
    priorities, positions, mask = head
    order = eviction_order(priorities, positions, mask)
    count = torch.minimum(torch.tensor(counts), mask.sum(-1)).clamp(max=min(at_most, positions.shape[1]))
    after = positions.clone()
    gone = evict(after, order, count, min(at_most, positions.shape[1]))
    for row in range(3):
        expected = [int(positions[row, slot]) for slot in order[row, : count[row]]]
        assert [p for p in gone[row].tolist() if p >= 0] == expected
        assert [int(p) for p in gone[row, count[row] :]] == [-1] * (gone.shape[1] - int(count[row]))
        kept = [-1 if p in expected else p for p in positions[row].tolist()]
        assert after[row].tolist() == kept
