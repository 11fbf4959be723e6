"""StreamingLLM: "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).

Keeps the first tokens (attention sinks) and the most recent ones:

    priority = position

Adapted: the sinks are the environment's ``sinks``; keys keep the rotary phase of their absolute position (the paper
re-rotates them to positions within the cache).
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.base import Policy
from kvenv.state import LayerState


class StreamingLLM(Policy):
    """The oldest candidate goes first."""

    name = "streaming"

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        # float32 holds every position below 2**24 exactly.
        return state.positions.to(torch.float32)
