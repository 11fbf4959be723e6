"""TOVA: "Transformers are Multi-State RNNs" (arXiv 2401.06104).

Keeps what the newest query attends to:

    priority_i = mean over query heads of a_newest(i)

Adapted: the paper averages over all heads of a layer and drops the same token in each; here every KV head evicts for
itself, so the mean is over the query heads of its group. Evictions come after each interval, not each token.
"""

from __future__ import annotations

from torch import Tensor

from agents.base import Policy, needed, precise
from kvenv.state import LayerState


class TOVA(Policy):
    """What the newest query attends to least goes first."""

    name = "tova"
    needs = frozenset({"last_attention"})

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        return precise(needed(state, "last_attention")).mean(2)
