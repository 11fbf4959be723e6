"""SnapKV: "SnapKV: LLM Knows What You Are Looking for Before Generation" (arXiv 2404.14469).

The last 32 queries, the observation window, vote for older pairs; votes are smoothed over neighbouring tokens, so that
what surrounds an important token survives with it:

    vote_i = sum over the observation window's queries t of a_t(i)
    priority_i = mean of the votes of the 5 cached tokens around i, zeros beyond the ends

Adapted: the paper compresses the prompt once, here the window moves along and is min(32, interval) queries. Votes are
averaged over the query heads of the group. Neighbours are those still cached. The observers themselves are not pooled
and, as the paper always keeps them, get the largest priority (they are protected anyway unless ``recent`` is smaller).
The paper pools by average or maximum with kernels of 5 to 7 by benchmark; average over 5 is its released default.
"""

from __future__ import annotations

from torch import Tensor

from agents.base import Policy, observing, pool_neighbours, statistic
from kvenv.state import LayerState


class SnapKV(Policy):
    """What the observation window attends to least goes first."""

    name = "snapkv"
    needs = frozenset({"stats"})
    window = 32
    kernel = 5

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        observers = observing(state, self.window)
        votes = statistic(state, f"sum{self.window}").masked_fill(observers, 0)
        pooled = pool_neighbours(votes, state, self.kernel, "mean")
        return pooled.masked_fill(observers, float(self.window))
