"""Uniformly random eviction, per KV head: the baseline every comparison contains.

``random-prompt`` is the baseline of "Random Attention" (arXiv 2609.03430): the whole prompt is kept and everything else
evicted uniformly at random for each KV head, which matches or beats published heuristics on reasoning traces.

    random:         priority = u,                           u ~ U(0, 1)
    random-prompt:  priority = u + [position < prompt length]

Adapted: the paper's recency window is the environment's ``recent``. Where the prompt alone exceeds the budget, prompt
pairs go at random, too. With the environment's ``protect_prompt`` the two are the same.
"""

from __future__ import annotations

from torch import Tensor

from agents.base import Policy, needed
from kvenv.state import LayerState


class Random(Policy):
    """Every candidate is equally likely to go."""

    name = "random"
    needs = frozenset({"noise"})

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        return needed(state, "noise")


class RandomPrompt(Policy):
    """Every candidate outside the prompt is equally likely to go, before any of the prompt."""

    name = "random-prompt"
    needs = frozenset({"noise"})

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        noise = needed(state, "noise")
        return noise + (state.positions < state.prompt_length[:, None, None]).to(noise.dtype)
