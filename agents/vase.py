"""VaSE: "Value-Aware Stochastic KV Cache Eviction for Reasoning Models" (arXiv 2606.03928), its variant VaSE-AttnV.

A quarter of the kept pairs are those whose values have the largest range; evicting them makes models loop. The others
are sampled without replacement in proportion to recent attention, which keeps caches of different heads diverse:

    range_i = max over channels of v_i - min over channels of v_i
    p_i = mean of the attention of the last queries to the 5 cached tokens around i, averaged over the group
    priority_i = above all others                              if range_i is among the largest quarter
                 log p_i - log(-log u_i),  u_i ~ U(0, 1)       otherwise

Adding Gumbel noise to log p and taking the largest is sampling without replacement (Gumbel top-k).

Adapted: only candidates compete, and the quarter is of those that the budget leaves to them, as sinks and recent
tokens are the environment's; the paper counts the sinks in. The queries are the last min(32, interval) (64 in the
paper), and their attention is over the whole cache, not over the pairs older than the window; observers of that window
are neither pooled nor sampled but kept, as in the paper (they are protected anyway unless ``recent`` is smaller).

Not confirmed: the paper's text was not readable to us; the rule, the quarter, the range and the kernel are the released
code's (mode ``range_sink_sample_attn``) and settings'. The second variant, VaSE-DKV (random projections of keys and
values instead of attention), is not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.base import Policy, needed, observing, pool_neighbours, precise, statistic
from kvenv.state import LayerState


class VaSE(Policy):
    """Values of small range go at random, the less attended the likelier."""

    name = "vase"
    needs = frozenset({"stats", "noise"})
    window = 32
    kernel = 5
    share = 0.25

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        observers = observing(state, self.window)
        attention = statistic(state, f"sum{self.window}").masked_fill(observers, 0)
        attention = pool_neighbours(attention, state, self.kernel, "mean")
        smallest = torch.finfo(attention.dtype).tiny
        gumbel = -(-needed(state, "noise").to(attention.dtype).log()).log()
        sampled = attention.clamp(min=smallest).log() + gumbel

        values = precise(state.values)
        spread = (values.amax(-1) - values.amin(-1)).masked_fill(~state.mask, -1)
        left = state.budget[:, None, None] - (state.filled & ~state.mask).sum(-1, keepdim=True)
        large = spread.argsort(-1, descending=True).argsort(-1) < (self.share * left).floor()
        top = sampled.masked_fill(~state.mask, 0).amax(-1, keepdim=True) + 1
        return torch.where((large & state.mask) | observers, top + spread.clamp(min=0), sampled)
