"""LagKV: "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important" (arXiv 2504.04704).

The cache in token order is cut into partitions of L tokens; each is normalised by its successor, per channel, and
tokens that vary most across channels are kept. For x = key and x = value, j in partition p:

    z_j = (x_j - min of x over p+1) / (max of x over p+1 - min of x over p+1)
    s_j = softmax over p of std over channels of z_j
    priority_j = rank of s_j(key) + s_j(value) within p / size of p

The rank is the paper's rule that every partition keeps the same share. The newest partition has no successor and is
kept (priority 1).

Adapted: the paper compresses a partition once and its survivors stay for good (first tokens and L = 128 apart); a
fixed budget can't, so at every decision the cached tokens are cut anew. L is the interval, and partitions are aligned
to the newest token: the last interval is the newest partition, and only the oldest may be short. Softmax, rank and size
are over candidates, minima and maxima over all filled slots of the successor. With an interval of 1 a partition has no
spread and the method degenerates to StreamingLLM.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from agents.base import Policy, precise, softmax_over
from kvenv.state import LayerState


class LagKV(Policy):
    """In each partition, what varies least across channels against the next partition goes first."""

    name = "lagkv"

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        capacity = state.positions.shape[-1]
        lag = min(state.interval, capacity)
        order = state.positions.argsort(-1)
        candidates = _partition(state.mask.gather(-1, order)[..., None], lag)[..., 0]
        filled = _partition(state.filled.gather(-1, order)[..., None], lag)

        score = torch.zeros((), device=order.device)
        for pairs in (state.keys, state.values):
            ordered = precise(pairs).gather(2, order[..., None].expand_as(pairs))
            score = score + _relative(_partition(ordered, lag), filled, candidates)
        rank = score.masked_fill(~candidates, -1).argsort(dim=-1, stable=True).argsort(-1)
        # Others fill the ranks below: taking their number off makes the share run from 0 whatever the padding.
        others = (~candidates).sum(-1, keepdim=True)
        share = (rank - others).to(score.dtype) / candidates.sum(-1, keepdim=True).clamp(min=1)
        share[..., -1, :] = 1
        in_order = share.flatten(-2)[..., -capacity:]
        return torch.empty_like(in_order).scatter_(-1, order, in_order)


def _partition(x: Tensor, lag: int) -> Tensor:
    """Cut (N, H, C, D) into (N, H, P, lag, D), the last partition whole, the first padded with zeros in front."""
    missing = -x.shape[2] % lag
    return F.pad(x, (0, 0, missing, 0)).unflatten(2, (-1, lag))


def _relative(x: Tensor, filled: Tensor, candidates: Tensor) -> Tensor:
    """Return s (N, H, P, lag) of the formula; the last partition's, which has no successor, means nothing."""
    successor, inside = x.roll(-1, 2), filled.roll(-1, 2)
    low = successor.masked_fill(~inside, torch.inf).amin(3, keepdim=True)
    high = successor.masked_fill(~inside, -torch.inf).amax(3, keepdim=True)
    spread = (high - low).clamp(min=torch.finfo(x.dtype).eps)
    relative = (x - low) / spread
    return softmax_over(relative.std(-1), candidates)
