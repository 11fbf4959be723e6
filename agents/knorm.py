"""KNorm: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression" (arXiv 2406.11430).

Keys of small norm tend to get much attention:

    priority_i = -||k_i||

Adapted: the paper leaves out the first two layers, here all layers follow the same rule.
"""

from __future__ import annotations

from torch import Tensor

from agents.base import Policy, encoded, precise
from kvenv.state import LayerState, Pairs


class KNorm(Policy):
    """The key of largest norm goes first."""

    name = "knorm"

    def encode(self, pairs: Pairs) -> Tensor:
        """Return the priorities (N, H, C, 1) of pairs, which depend on nothing else."""
        return -precise(pairs.keys).norm(dim=-1, keepdim=True)

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        return encoded(self, state).squeeze(-1)
