"""Soft ranks are the nearest point of the permutahedron, with the gradient of finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from agents.soft_rank import soft_rank, soft_rank_loss

ROWS = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.floats(-4, 4, allow_subnormal=False), min_size=n, max_size=n)
)  # fmt: skip


def everything(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)


@given(ROWS, st.sampled_from([0.1, 1.0, 5.0]))
def test_no_other_point_of_the_permutahedron_is_nearer(row: list[float], strength: float) -> None:
    scores = torch.tensor(row, dtype=torch.float64)
    found = soft_rank(scores, everything(scores), strength)
    vertices = torch.tensor(list(itertools.permutations(range(1, len(row) + 1))), dtype=torch.float64)
    # Inside: no direction in which it lies beyond all vertices; sums of the k largest are enough (Rado).
    largest = found.sort(descending=True).values.cumsum(0)
    assert (largest <= torch.arange(len(row), 0, -1).double().cumsum(0) + 1e-9).all()
    assert float(found.sum()) == pytest.approx(len(row) * (len(row) + 1) / 2)
    # Nearest: every vertex, and so all of the hull, lies behind the plane through it across the way there.
    way = -scores / strength - found
    assert ((vertices - found) @ way <= 1e-8).all()


def test_far_apart_scores_have_their_ranks_and_close_ones_themselves() -> None:
    scores = torch.tensor([30.0, -20.0, 10.0, 0.0])
    assert torch.equal(soft_rank(scores, everything(scores)), torch.tensor([1.0, 4.0, 2.0, 3.0]))
    close = torch.tensor([0.3, -0.2, 0.1, -0.2], dtype=torch.float64)
    torch.testing.assert_close(soft_rank(close, everything(close)), 2.5 - close)


def test_the_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(4, 9, generator=generator, dtype=torch.float64)).requires_grad_()
    mask = torch.arange(9) < torch.tensor([9, 5, 1, 7])[:, None]
    assert torch.autograd.gradcheck(lambda x: soft_rank(x, mask), scores)
    utility = torch.rand(4, 9, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: soft_rank_loss(x, utility, mask), scores)


def test_what_is_masked_is_not_there() -> None:
    scores, utility = torch.tensor([[2.0, 9.0, -1.0, 0.5]]), torch.tensor([[0.3, 9.0, 0.1, 0.2]])
    mask = torch.tensor([[True, False, True, True]])
    alone = soft_rank(scores[mask], torch.ones(3, dtype=torch.bool))
    assert torch.equal(soft_rank(scores, mask)[mask], alone)
    assert soft_rank(scores, mask)[~mask] == 0
    expected = (((alone - torch.tensor([1.0, 3.0, 2.0])) / 3) ** 2).mean()
    torch.testing.assert_close(soft_rank_loss(scores, utility, mask), expected)
