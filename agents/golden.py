"""Golden Eviction: decided with the full-cache run's future attention (ForesightKV, arXiv 2602.03203).

    golden:           priority_i = utility of pair i in the rest of this trace
    golden-expected:  priority_i = the same, averaged over continuations of the same prefix resampled from the family

The first is clairvoyant; the second knows what a causal policy can know, each head for itself: heads that share the
work can do better (:func:`agents.ranking_losses.team_cost`). Utilities come with the state, see :mod:`kvenv.golden` for
both reductions.
"""

from __future__ import annotations

from torch import Tensor

from agents.base import Policy, needed
from kvenv.state import LayerState


class Golden(Policy):
    """What this trace will attend to least goes first."""

    name = "golden"
    needs = frozenset({"future"})

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        return needed(state, "future")


class GoldenExpected(Policy):
    """What continuations of this prefix will attend to least, on average, goes first."""

    name = "golden-expected"
    needs = frozenset({"expected_future"})

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        return needed(state, "expected_future")
