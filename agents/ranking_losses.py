"""Losses that teach a scorer an expert's order of cached pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kvenv import plackett_luce
from kvenv.ranking import eviction_order

LossName = Literal["team-cost", "cost", "pairwise-weighted", "pairwise", "regression", "listwise", "likelihood"]


def expected_cost(scores: Tensor, utility: Tensor, mask: Tensor) -> Tensor:
    """Return the cost over all budgets that rankings drawn by the scores are expected to have (KVP's reward, negative).

    Under the Plackett-Luce model a pair goes before another with the probability that the two alone would give, so that
    the mean over all rankings has a closed form: no ranking is drawn. Parameters are those of :func:`pairwise_hinge`.

    Returns
    -------
    Tensor ()
        Over the cost of golden's order: 1 is the best; mean over the decisions in which any pair is of use.
    """
    worth = torch.where(mask, utility.to(scores.dtype).clamp(min=0), 0.0)
    return _over_least((worth * _expected_rank(scores, mask)).sum(dim=-1), worth)


def team_cost(scores: Tensor, utility: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Return the expected cost of the heads of a layer together: what a head evicts costs less if another holds it.

    A head stands in for another at a position as far as golden says that it will attend to it, up to as much, and at
    the share of budgets at which it is expected to hold the pair: at all of them if the pair is protected, at none if
    it has been evicted. Heads that see the same would otherwise all keep, and all lose, the same pairs.

    Parameters
    ----------
    scores, utility : Tensor (N, H, C)
        The scorer's output and golden's utility.
    mask : Tensor (N, H, C) bool
        Candidates.
    positions : Tensor (N, H, C) int64
        Of the pairs, -1 where a slot is empty.

    Returns
    -------
    Tensor ()
        Over the cost of golden's order, each head for itself.
    """
    heads, length = scores.shape[1], int(positions.max()) + 2
    useful = utility.to(scores.dtype).clamp(min=0)
    rank = _expected_rank(scores, mask)
    gone = torch.where(mask, rank / mask.sum(dim=-1, keepdim=True).clamp(min=1), 0.0)

    def elsewhere(values: Tensor, absent: float) -> Tensor:
        """Return what every head (N, H, other H, C) says of the pairs of each."""
        by_position = values.new_full((*values.shape[:2], length), absent).scatter(-1, positions + 1, values)
        at = (positions + 1)[:, :, None].expand(-1, -1, heads, -1)
        return by_position[:, None].expand(-1, heads, -1, -1).gather(-1, at)

    stands_in = (elsewhere(useful, 0.0) / useful.clamp(min=1e-12)[:, :, None]).clamp(max=1.0)
    missing = 1 - stands_in * (1 - elsewhere(gone, 1.0))
    itself = torch.eye(heads, dtype=torch.bool, device=scores.device)[:, :, None]
    worth = torch.where(mask, useful, 0.0)
    return _over_least((worth * rank * torch.where(itself, 1.0, missing).prod(dim=2)).sum(dim=-1), worth)


def _expected_rank(scores: Tensor, mask: Tensor) -> Tensor:
    """Return at which rank (..., C) each pair is expected, 1 being kept longest, among the candidates."""
    before = (scores[..., None, :] - scores[..., :, None]).sigmoid() * mask[..., None, :]
    # A pair counts as before itself with one half: ranks begin at 1.
    return 0.5 + before.sum(dim=-1)


def _over_least(cost: Tensor, worth: Tensor) -> Tensor:
    """Return the mean of costs (...) over the least that is possible, over the decisions in which a pair is of use."""
    best = worth.sort(dim=-1, descending=True).values
    least = (best * torch.arange(1, best.shape[-1] + 1, device=best.device)).sum(dim=-1)
    useful = least > 0
    return torch.where(useful, cost / least.clamp(min=1e-8), 0.0).sum() / useful.sum().clamp(min=1)


def pairwise_hinge(scores: Tensor, utility: Tensor, mask: Tensor, margin: float, weighted: bool = True) -> Tensor:
    """Return the pairwise ranking hinge loss.

    Weighted, a pair counts by the difference of the square roots of its two utilities: the order among pairs that
    nobody will look at decides nothing, and unweighted they are nearly all there is.

    Parameters
    ----------
    scores, utility : Tensor (..., C)
        The scorer's output and golden's utility.
    mask : Tensor (..., C) bool
        Candidates.
    margin : float
        How much higher the better of two pairs must score.
    weighted : bool
        Whether pairs count by how much their order matters.

    Returns
    -------
    Tensor ()
        Mean over the ordered pairs of candidates with different utilities.
    """
    root = utility.to(scores.dtype).clamp(min=0).sqrt()
    weight = (root[..., :, None] - root[..., None, :]).clamp(min=0)
    weight = weight * (mask[..., :, None] & mask[..., None, :])
    if not weighted:
        weight = (weight > 0).to(scores.dtype)
    short = (margin - (scores[..., :, None] - scores[..., None, :])).clamp(min=0)
    return (weight * short).sum() / weight.sum().clamp(min=1e-8)


def regression(scores: Tensor, utility: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error on log(utility + 1e-4), both sides less their mean over the decision's candidates.

    An offset that all pairs of a decision share changes no ranking. Parameters are those of :func:`pairwise_hinge`.
    """
    error = scores - (utility.to(scores.dtype).clamp(min=0) + 1e-4).log()
    count = mask.sum(dim=-1, keepdim=True).clamp(min=1)
    centred = error - torch.where(mask, error, 0.0).sum(dim=-1, keepdim=True) / count
    return torch.where(mask, centred**2, 0.0).sum() / mask.sum().clamp(min=1)


def listwise(scores: Tensor, utility: Tensor, mask: Tensor) -> Tensor:
    """Return the divergence of the scores' softmax from golden's shares of utility (ListNet, Cao et al. 2007).

    Shares are those of the square roots, as in the weighted hinge. Parameters are those of :func:`pairwise_hinge`;
    the result is in nats, the mean over decisions.
    """
    root = torch.where(mask, utility.to(scores.dtype).clamp(min=0).sqrt() + 1e-6, 0.0)
    share = root / root.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    logs = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 4).log_softmax(dim=-1)
    divergence = torch.where(mask, share * (share.clamp(min=1e-12).log() - logs), 0.0).sum(dim=-1)
    return divergence.sum() / mask.any(dim=-1).sum().clamp(min=1)


def likelihood(scores: Tensor, utility: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Return minus the log-likelihood per pick of golden's order under Plackett-Luce (ListMLE, Xia et al. 2008).

    Parameters are those of :func:`pairwise_hinge`, and ``positions`` (..., C) break ties; in nats.
    """
    order, picks = eviction_order(utility, positions, mask), mask.sum(dim=-1)
    logs = plackett_luce.log_prob(-scores, order, mask, picks, mask.shape[-1])
    return -logs.sum() / picks.sum().clamp(min=1)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]] = {
    "team-cost": lambda scores, utility, mask, positions, _: team_cost(scores, utility, mask, positions),
    "cost": lambda scores, utility, mask, _, __: expected_cost(scores, utility, mask),
    "pairwise-weighted": lambda scores, utility, mask, _, margin: pairwise_hinge(scores, utility, mask, margin),
    "pairwise": lambda scores, utility, mask, _, margin: pairwise_hinge(scores, utility, mask, margin, False),
    "regression": lambda scores, utility, mask, _, __: regression(scores, utility, mask),
    "listwise": lambda scores, utility, mask, _, __: listwise(scores, utility, mask),
    "likelihood": lambda scores, utility, mask, positions, _: likelihood(scores, utility, mask, positions),
}
"""Losses by name, as functions of (scores, utility, mask, positions, margin)."""
