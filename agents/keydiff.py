"""KeyDiff: "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference" (arXiv 2504.15364).

Keeps keys that differ from the rest, by their angle to the mean direction:

    anchor = mean over cached j of k_j / ||k_j||
    priority_i = -cos(k_i, anchor)

Adapted: nothing. The anchor is over all filled slots, protected ones included, as the paper's is over the whole cache.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from agents.base import Policy, encoded, precise
from kvenv.state import LayerState, Pairs


class KeyDiff(Policy):
    """The key closest to the mean direction goes first."""

    name = "keydiff"

    def encode(self, pairs: Pairs) -> Tensor:
        """Return the directions (N, H, C, D) of keys."""
        return F.normalize(precise(pairs.keys), dim=-1)

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        directions = encoded(self, state)
        # A cosine does not change with the anchor's length: the sum serves as the mean.
        anchor = F.normalize(state.filled[..., None, :].to(directions.dtype) @ directions, dim=-1)
        return -(directions @ anchor.transpose(-1, -2)).squeeze(-1)
