"""Plackett-Luce prefixes: probabilities that sum to 1, gradients, divergence, and the order that is executed."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvenv import noise, plackett_luce
from kvenv.ranking import action_from_order, order_from_action

LOGITS = st.lists(st.floats(-200, 200), min_size=5, max_size=5).map(lambda x: torch.tensor(x, dtype=torch.float64))
MASK = torch.tensor([True, True, False, True, True])


def prefixes(count: int) -> torch.Tensor:
    """Return all orders (P, 5) that differ in their first ``count`` candidates."""
    slots = [0, 1, 3, 4]
    return torch.tensor([[*picks, *(s for s in slots if s not in picks), 2] for picks in permutations(slots, count)])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@given(logits=LOGITS)
def test_prefix_probabilities_sum_to_one(count: int, logits: torch.Tensor) -> None:
    orders = prefixes(count)
    rows = len(orders)
    picks = plackett_luce.log_prob(
        logits.expand(rows, -1), orders, MASK.expand(rows, -1), torch.full((rows,), count), 4
    )
    assert not picks[:, count:].any()
    torch.testing.assert_close(picks.sum(-1).exp().sum(), torch.tensor(1.0).double())


@given(logits=LOGITS, reference=LOGITS)
def test_each_pick_by_hand(logits: torch.Tensor, reference: torch.Tensor) -> None:
    order, count = torch.tensor([4, 0, 3, 1, 2]), torch.tensor(3)
    arguments = (order, MASK, count, 4)
    log_prob = plackett_luce.log_prob(logits, *arguments)
    kl = plackett_luce.kl(logits, reference, *arguments)
    entropy = plackett_luce.entropy(logits, *arguments)
    for pick in range(3):
        left = order[pick:4]
        p, q = logits[left].log_softmax(0), reference[left].log_softmax(0)
        torch.testing.assert_close(log_prob[pick], p[0])
        torch.testing.assert_close(kl[pick], (p.exp() * (p - q)).sum(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(entropy[pick], -(p.exp() * p).sum(), rtol=1e-9, atol=1e-9)
    for x in (log_prob, kl, entropy):
        assert x[3] == 0


def test_gradients_check_numerically() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 3, 5, generator=rng, dtype=torch.float64)
    logits.requires_grad_()
    order = torch.tensor([[4, 0, 3, 1, 2], [0, 1, 3, 4, 2], [3, 1, 4, 0, 2]])
    arguments = (order, MASK.expand(3, -1), torch.tensor([4, 2, 0]), 4)
    assert torch.autograd.gradcheck(lambda x: plackett_luce.log_prob(x, *arguments), logits)
    assert torch.autograd.gradcheck(lambda x: plackett_luce.kl(x, reference, *arguments), logits)
    assert torch.autograd.gradcheck(lambda x: plackett_luce.entropy(x, *arguments), logits)


def test_there_is_no_pull_away_from_a_reference_that_is_equal() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    order = torch.tensor([4, 0, 3, 1, 2]).expand(6, -1)
    kl = plackett_luce.kl(logits, logits.detach(), order, MASK.expand(6, -1), torch.full((6,), 4), 4)
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    torch.testing.assert_close(kl, torch.zeros(6, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, torch.zeros(6, 5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_and_masked_slots_stay_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, torch.nan, 0.0, 3.0], [0.0] * 5], dtype=dtype, requires_grad=True)
    order = torch.tensor([[1, 3, 4, 0, 2], [0, 1, 2, 3, 4]])
    mask = torch.stack([MASK, torch.zeros(5, dtype=torch.bool)])
    arguments = (order, mask, torch.tensor([4, 0]), 4)
    total = (
        plackett_luce.log_prob(logits, *arguments).sum()
        + plackett_luce.kl(logits, torch.zeros(2, 5, dtype=dtype), *arguments).sum()
        + plackett_luce.entropy(logits, *arguments).sum()
    )
    (gradient,) = torch.autograd.grad(total, logits)
    assert total.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()


def test_samples_follow_the_probabilities() -> None:
    draws, count = 40_000, 2
    logits = torch.tensor([0.0, 1.0, 9.0, -0.5, 2.0])
    uniform = noise.uniform(5, torch.arange(draws)[:, None], torch.arange(5)[None])
    mask = MASK.expand(draws, -1)
    orders = plackett_luce.sample(logits.expand(draws, -1), torch.arange(5).expand(draws, -1), mask, uniform)
    assert (orders[:, 4] == 2).all(), "a non-candidate is never picked"
    for prefix in prefixes(count):
        expected = plackett_luce.log_prob(logits, prefix, MASK, torch.tensor(count), count).sum().exp()
        seen = (orders[:, :count] == prefix[:count]).all(-1).float().mean()
        assert abs(float(seen - expected)) < 5 * float((expected * (1 - expected) / draws) ** 0.5)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_the_order_from_the_action_is_the_one_sampled(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    slots = 9
    positions = torch.randperm(30, generator=rng)[:slots].expand(4, -1)
    mask = torch.rand(4, slots, generator=rng) < 0.7
    logits = torch.randn(4, slots, generator=rng)
    order = plackett_luce.sample(logits, positions, mask, torch.rand(4, slots, generator=rng).clamp(min=1e-6))
    executed = order_from_action(action_from_order(order, mask), positions, mask)
    count = mask.sum(-1).clamp(max=4)
    arguments = (mask, count, 4)
    for row in range(4):
        assert torch.equal(executed[row, : count[row]], order[row, : count[row]])
    sampled, recovered = (plackett_luce.log_prob(logits, o, *arguments) for o in (order, executed))
    torch.testing.assert_close(recovered, sampled)
