"""H2O: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (arXiv 2306.14048).

Heavy hitters are the pairs with the largest attention accumulated over all queries that saw them:

    priority_i = sum over queries t of a_t(i)

Adapted: the sum is averaged over the query heads of the group (the paper predates grouped queries); the paper's
recent half of the budget is off, the environment's ``recent`` takes its place.
"""

from __future__ import annotations

from torch import Tensor

from agents.base import Policy, statistic
from kvenv.state import LayerState


class H2O(Policy):
    """The least attended pair so far goes first."""

    name = "h2o"
    needs = frozenset({"stats"})

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        return statistic(state, "cumulative")
