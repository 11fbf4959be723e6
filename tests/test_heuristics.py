"""Every built-in policy against its formula written a second time, and what must hold for all of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import agents
from agents.base import Policy
from kvenv.rotary import Rotary
from kvenv.state import NEEDS, LayerState, Protection
from tests.reference_heuristics import REFERENCES, head_of

BUILT_IN = tuple(REFERENCES)
SLOT_FIELDS = ("positions", "mask", "filled", "future", "expected_future", "noise", "keys", "values")
SLOT_FIELDS_BY_QUERY_HEAD = ("stats", "last_attention")
FIELDS_OF_NEED = {"queries": ("queries", "query_valid"), "query_moments": ("query_mean", "query_cov", "rotary")}


def random_state(
    seed: int = 0,
    *,
    rows: int = 2,
    heads: int = 2,
    group: int = 2,
    size: int = 6,
    interval: int = 5,
    budget: int = 17,
    protection: Protection | None = None,
    short_window: bool = False,
) -> LayerState:
    """Return a float64 state with every field: shuffled slots, empty ones among them, other tokens in each head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    capacity = budget + interval
    per_slot = (rows, heads, capacity)
    next_position = torch.randint(3 * capacity, 5 * capacity, (rows,), generator=generator)
    positions = torch.full(per_slot, -1)
    for row in range(rows):
        # The newest interval + 1 tokens are always there, older ones where they survived; the last row has gaps.
        newest = torch.arange(int(next_position[row]) - interval - 1, int(next_position[row]))
        for head in range(heads):
            older = torch.randperm(int(newest[0]), generator=generator)
            held = torch.cat((newest, older))[: capacity - 3 * row - head]
            slots = torch.randperm(capacity, generator=generator)[: len(held)]
            positions[row, head, slots] = held
    prompt_length = torch.randint(0, capacity, (rows,), generator=generator)
    protection = protection or Protection(sinks=4, recent=interval)
    valid = torch.ones(rows, interval, dtype=torch.bool)
    if short_window:
        valid[0, : interval // 2] = False
    root = normal(rows, heads, group, size, size)
    return LayerState(
        layer=1,
        keys=normal(*per_slot, size),
        values=normal(*per_slot, size),
        positions=positions,
        groups=group,
        mask=protection.candidates(positions, next_position, prompt_length),
        filled=positions >= 0,
        next_position=next_position,
        prompt_length=prompt_length,
        budget=torch.full((rows,), budget),
        interval=interval,
        stats=uniform(rows, heads, group, capacity, 8),
        last_attention=uniform(rows, heads, group, capacity),
        queries=normal(rows, heads, group, interval, size),
        query_valid=valid,
        query_mean=normal(rows, heads, group, size),
        query_cov=root @ root.mT / size,
        rotary=Rotary(torch.tensor([1.0, 0.01], dtype=torch.float64), scaling=1.1),
        future=uniform(*per_slot),
        expected_future=uniform(*per_slot),
        noise=uniform(*per_slot).clamp(1e-6, 1 - 1e-6),
    )


def replace_slots(state: LayerState, change: Callable[[Tensor, int], Tensor]) -> LayerState:
    """Return the state with ``change(tensor, slot_axis)`` applied to all that is stored by slot."""
    fields = {name: change(getattr(state, name), 2) for name in SLOT_FIELDS}
    by_query_head = {name: change(getattr(state, name), 3) for name in SLOT_FIELDS_BY_QUERY_HEAD}
    return dataclasses.replace(state, **fields, **by_query_head)


CASES = {
    "usual": {},
    "nothing protected": {"protection": Protection(sinks=0, recent=0)},
    "prompt protected": {"protection": Protection(sinks=4, recent=9, prompt=True), "interval": 9, "budget": 40},
    "short first window": {"short_window": True, "interval": 12, "protection": Protection(sinks=2, recent=2)},
    "interval beyond every window": {"interval": 40, "budget": 30, "protection": Protection(sinks=4, recent=2)},
    "interval beyond the rest": {"interval": 20, "budget": 7, "protection": Protection(sinks=0, recent=3)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BUILT_IN)
def test_priorities_follow_the_formula(name: str, case: str) -> None:
    for seed in range(6):
        state = random_state(seed, **CASES[case])
        priorities = agents.make(name)(state)
        assert priorities.shape == state.positions.shape
        for row in range(state.positions.shape[0]):
            for head in range(state.positions.shape[1]):
                reference = head_of(state, row, head)
                expected = dict(zip(reference.positions, REFERENCES[name](reference)))
                slots = state.mask[row, head].nonzero().flatten().tolist()
                got = [float(priorities[row, head, slot]) for slot in slots]
                want = [expected[int(state.positions[row, head, slot])] for slot in slots]
                np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_permuting_slots_permutes_priorities(name: str, seed: int) -> None:
    state = random_state(seed)
    order = torch.rand(state.positions.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)

    def permute(x: Tensor, axis: int) -> Tensor:
        index = order if axis == 2 else order[:, :, None].expand(*x.shape[:3], -1)
        return x.gather(axis, index if x.dim() == axis + 1 else index[..., None].expand_as(x))

    policy = agents.make(name)
    torch.testing.assert_close(
        policy(replace_slots(state, permute)).gather(-1, order.argsort(-1)).where(state.mask, 0),
        policy(state).where(state.mask, 0).to(torch.float64 if name != "streaming" else torch.float32),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_empty_slots_hold_changes_nothing(name: str) -> None:
    state = random_state(3)
    assert not state.filled.all()

    def spoil(x: Tensor, axis: int) -> Tensor:
        if not x.is_floating_point():
            return x
        empty = ~state.filled if axis == 2 else ~state.filled[:, :, None]
        return x.masked_fill(empty if x.dim() == axis + 1 else empty[..., None], 1e30)

    policy = agents.make(name)
    clean, spoiled = policy(state), policy(replace_slots(state, spoil))
    assert torch.equal(clean[state.mask], spoiled[state.mask])


@pytest.mark.parametrize("name", BUILT_IN)
def test_rows_do_not_see_each_other(name: str) -> None:
    state = random_state(4, rows=3)
    per_row = {
        field.name: value[1:2]
        for field in dataclasses.fields(state)
        if isinstance(value := getattr(state, field.name), Tensor)
    }
    alone = dataclasses.replace(state, **per_row)
    policy = agents.make(name)
    torch.testing.assert_close(policy(alone)[0], policy(state)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_policy_reads_only_what_it_needs_and_says_what_is_missing(name: str) -> None:
    state, policy = random_state(5), agents.make(name)
    assert policy.name == name
    assert policy.needs <= set(NEEDS)

    def without(needs: set[str]) -> LayerState:
        fields = [field for need in needs for field in FIELDS_OF_NEED.get(need, (need,))]
        return dataclasses.replace(state, **dict.fromkeys(fields))

    lean = policy(without(set(NEEDS) - policy.needs))
    assert torch.equal(lean, policy(state))
    for need in policy.needs:
        with pytest.raises(ValueError, match=r"state\.\w+, which is None"):
            policy(without({need}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_dtype_gives_finite_priorities(name: str, dtype: torch.dtype) -> None:
    state = random_state(6)
    low = dataclasses.replace(
        state,
        keys=state.keys.to(dtype),
        values=state.values.to(dtype),
        queries=state.queries.to(dtype),
        rotary=Rotary(torch.tensor([1.0, 0.01])),
        **{need: getattr(state, need).float() for need in ("stats", "last_attention", "query_mean", "query_cov")},
        **{need: getattr(state, need).float() for need in ("future", "expected_future", "noise")},
    )
    priorities = agents.make(name)(low)
    assert priorities.dtype in (torch.float32, torch.float64)
    assert priorities[low.mask].isfinite().all()


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_empty_cache_gives_no_nan(name: str) -> None:
    state = random_state(7)
    nothing = torch.zeros_like(state.mask)
    empty = dataclasses.replace(
        state,
        positions=torch.full_like(state.positions, -1),
        mask=nothing,
        filled=nothing,
        next_position=state.budget * 0,
    )
    assert not agents.make(name)(empty).isnan().any()


class Operations(TorchDispatchMode):
    """Records the names of the operations that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_read_back_and_as_many_operations_for_any_size(name: str) -> None:
    small, large = random_state(rows=1, heads=1, budget=12), random_state(rows=4, heads=3, budget=37)
    policy = agents.make(name)
    with Operations() as few:
        policy(small)
    with Operations() as many:
        policy(large)
    assert few.names == many.names
    data_dependent = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
    assert not data_dependent & set(many.names)


def test_vase_samples_in_proportion_to_attention() -> None:
    # One large value is always kept; of the rest, one of three is, with probabilities 1/6, 2/6, 3/6.
    draws = 20_000
    base = random_state(rows=1, heads=1, group=1, budget=4, interval=1, protection=Protection(sinks=0, recent=0))
    spaced = torch.tensor([[[4, 3, 2, 1, 0]]])
    values = torch.zeros(1, 1, 5, 6, dtype=torch.float64)
    values[..., 4, 0] = 9
    stats = torch.tensor([0.0, 3, 2, 1, 0], dtype=torch.float64)[None, None, None, :, None].expand(1, 1, 1, 5, 8)
    state = dataclasses.replace(
        base,
        values=values,
        stats=stats,
        positions=spaced,
        filled=spaced >= 0,
        mask=spaced >= 0,
        next_position=torch.tensor([5]),
        noise=torch.rand(draws, 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    policy = agents.make("vase")
    policy.kernel = 1
    kept = policy(state).argsort(-1, descending=True)[:, 0]
    assert (kept[:, :2].sort(-1).values == torch.tensor([0, 4])).all(), "the observer and the large value"
    frequency = torch.bincount(kept[:, 2], minlength=5)[1:4] / draws
    torch.testing.assert_close(frequency, torch.tensor([3.0, 2, 1]) / 6, rtol=0, atol=0.015)


def test_names_lists_what_design_promises() -> None:
    assert set(agents.names()) >= set(BUILT_IN)
    assert agents.__kvenv__


def test_importing_agents_is_light() -> None:
    code = "import agents, sys; agents.names(); sys.exit('torch' in sys.modules or 'agents.h2o' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_policy_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"unknown policy 'h20': known are random, .*golden-expected, .*ppo-tiny, or a directory"
    ):
        agents.make("h20")


def test_a_registered_policy_is_made_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents._POLICIES, "_values", dict(agents._POLICIES._values))

    class Newest(Policy):
        name = "newest"

        def __call__(self, state: LayerState) -> Tensor:
            return state.positions.float()

    agents.register("newest", Newest)
    assert isinstance(agents.make("newest"), Newest)
    with pytest.raises(ValueError, match="'newest' is already registered"):
        agents.register("newest", Newest)


def test_a_saved_policy_is_loaded_by_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents._TYPES, "_values", {})
    agents.register_type("test", lambda directory, device="cpu": (directory, device))
    (tmp_path / "policy.json").write_text(json.dumps({"type": "test"}))
    assert agents.make(tmp_path, device="meta") == (tmp_path, "meta")
    assert agents.make(str(tmp_path)) == (tmp_path, "cpu")


@pytest.mark.parametrize("content", ["{", "[]", "{}", "7", "\xff"])
def test_a_malformed_policy_directory_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "policy.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"policy\.json is not a policy description"):
        agents.make(tmp_path)


def test_a_directory_of_unknown_type_or_without_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no policy\.json"):
        agents.make(tmp_path)
    (tmp_path / "policy.json").write_text('{"type": "magic"}')
    with pytest.raises(ValueError, match="unknown policy type 'magic'"):
        agents.make(tmp_path)
