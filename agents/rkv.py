"""R-KV: "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models" (arXiv 2505.24133).

Keeps what is important and not repeated. With the last 8 queries t as observers, keys of the cached tokens in order:

    a_ti = softmax_i(maximum over the group of q_t.k_i / sqrt(d))
    importance_i = maximum over the 7 cached tokens around i of the mean over t of a_ti
    S_ij = cos(k_i, k_j), but 0 where i = j and where j is the newest token with S_ij > 0.5 (the latest copy is kept)
    redundancy_j = softmax_j(mean over i of S_ij)
    priority = 0.1 * importance - 0.9 * redundancy

The softmax of the importance is over keys older than the observers, as is the pooling.

Adapted: the observers are the last min(8, interval) queries. They have no importance in the paper, which always keeps
them, and get the largest here (they are protected anyway unless ``recent`` is smaller). Similarities are over all
filled slots, their mean over as many. Where no token is similar the released code clears the first column instead; here
nothing is cleared. Its default weight is 0.07; 0.1 is the paper's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from agents.base import Policy, needed, observing, pool_neighbours, precise, softmax_over
from kvenv.state import LayerState


class RKV(Policy):
    """What is unimportant or repeated later goes first."""

    name = "r-kv"
    needs = frozenset({"queries"})
    window = 8
    kernel = 7
    weight = 0.1
    threshold = 0.5

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        return self.weight * self.importance(state) - (1 - self.weight) * self.redundancy(state)

    def importance(self, state: LayerState) -> Tensor:
        """Return the observers' attention (N, H, C), pooled over neighbours."""
        queries, valid = needed(state, "queries"), needed(state, "query_valid")
        steps = torch.arange(valid.shape[1], device=valid.device)
        newest = steps.where(valid, -1).topk(min(self.window, valid.shape[1]), dim=-1).indices
        observed = valid.gather(-1, newest)
        chosen = queries.gather(3, newest[:, None, None, :, None].expand(*queries.shape[:3], -1, queries.shape[-1]))
        logits = torch.einsum("nhgwd,nhcd->nhgwc", precise(chosen), precise(state.keys)) / math.sqrt(queries.shape[-1])

        observers = observing(state, self.window)
        attention = softmax_over(logits.amax(2), (state.filled & ~observers)[:, :, None, :])
        count = observed.sum(-1).clamp(min=1)
        mean = (attention * observed[:, None, :, None]).sum(2) / count[:, None, None]
        return pool_neighbours(mean, state, self.kernel, "max").masked_fill(observers, 1)

    def redundancy(self, state: LayerState) -> Tensor:
        """Return how much each key repeats in others (N, H, C); memory is O(C^2) per head."""
        directions = F.normalize(precise(state.keys), dim=-1).masked_fill(~state.filled[..., None], 0)
        similarity = directions @ directions.transpose(-1, -2)
        diagonal = torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
        similarity = similarity.masked_fill(diagonal, 0)

        positions = state.positions[:, :, None, :].expand_as(similarity)
        similar = positions.where(similarity > self.threshold, -1)
        latest = (similar == similar.amax(-1, keepdim=True)) & (similar >= 0)
        count = state.filled.sum(-1, keepdim=True).clamp(min=1)
        mean = similarity.masked_fill(latest, 0).sum(-2) / count
        return softmax_over(mean, state.filled)
