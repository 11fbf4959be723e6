"""Soft ranks: the differentiable relaxation that KVP's paper tried in place of reinforcement learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def soft_rank(scores: Tensor, mask: Tensor, strength: float = 1.0) -> Tensor:
    """Return soft ranks, 1 being the highest score (Blondel et al. 2020, arXiv 2002.08871, section 4).

    They are the point of the permutahedron, the convex hull of all permutations of 1 ... n, that is nearest to
    -scores / strength. Where scores differ by much more than the strength these are the ranks; where all differ by
    less they are the scores themselves, turned round and shifted to the mean rank. The projection is an isotonic
    regression of the sorted scores (section 5), whose solution is constant on blocks and there their mean: autograd
    through the means is the exact gradient.

    Parameters
    ----------
    scores : Tensor (..., C)
        Higher is better.
    mask : Tensor (..., C) bool, broadcastable
        What is ranked; n of each row.
    strength : float
        Of the regularisation, in units of the scores.

    Returns
    -------
    Tensor (..., C)
        0 where nothing is ranked.
    """
    mask = mask.expand(scores.shape)
    worst_first = torch.where(mask, -scores / strength, -torch.inf).sort(dim=-1, descending=True)
    count = mask.sum(dim=-1, keepdim=True)
    place = torch.arange(scores.shape[-1], device=scores.device)
    ranked = place < count
    by_score = torch.where(ranked, worst_first.values, 0.0)
    above = torch.where(ranked, by_score - (count - place), 0.0)
    block = _blocks(above.detach(), count)
    size = torch.zeros_like(above).scatter_add(-1, block, torch.ones_like(above))
    mean = torch.zeros_like(above).scatter_add(-1, block, above) / size.clamp(min=1)
    ranks = torch.where(ranked, by_score - mean.gather(-1, block), 0.0)
    return torch.zeros_like(ranks).scatter(-1, worst_first.indices, ranks)


def soft_rank_loss(scores: Tensor, utility: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error of soft ranks, over the number of pairs ranked, to the ranks of the utilities.

    Parameters
    ----------
    scores, utility : Tensor (..., C)
        The scorer's output, and what pairs are worth.
    mask : Tensor (..., C) bool, broadcastable
        Candidates.

    Returns
    -------
    Tensor ()
        Mean over candidates.
    """
    mask = mask.expand(scores.shape)
    best_first = torch.where(mask, utility, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype).expand(scores.shape)
    true = torch.empty_like(scores).scatter(-1, best_first, rank)
    error = (soft_rank(scores, mask) - true) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(mask, error.square(), 0.0).sum() / mask.sum().clamp(min=1)


def _blocks(values: Tensor, count: Tensor) -> Tensor:
    """Return the block (..., C) of each of the first ``count`` values in their nearest non-increasing sequence.

    What comes after them has a block of its own.
    """
    rows = values.reshape(-1, values.shape[-1])
    sizes = [_pool(row[:n]) for row, n in zip(rows.tolist(), count.reshape(-1).tolist(), strict=True)]
    width = values.shape[-1]
    blocks = [
        torch.repeat_interleave(torch.arange(len(row) + 1), torch.tensor([*row, width - sum(row)])) for row in sizes
    ]
    return torch.stack(blocks).to(values.device).view(values.shape)


def _pool(values: Sequence[float]) -> list[int]:
    """Return the lengths of the blocks that pooling adjacent violators leaves (Best and Chakravarti 1990)."""
    totals: list[float] = []
    lengths: list[int] = []
    for value in values:
        total, length = value, 1
        while totals and totals[-1] * length < total * lengths[-1]:
            total, length = total + totals.pop(), length + lengths.pop()
        totals.append(total)
        lengths.append(length)
    return lengths
