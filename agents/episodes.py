"""Rollouts that agents learn from: which traces, decoded how, and the constants that a scorer takes from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from agents.scorer import Inputs, Scorer
from kvenv.attention import HandedCache
from kvenv.features import FeatureSet
from kvenv.golden import FutureAttention, future_attention
from kvenv.layerwise import Policy, Rollout, rollout
from kvenv.limits import Limits
from kvenv.state import LayerState, Protection
from kvenv.traces import Trace, TraceSource

CALIBRATED_ON = 4
"""Decisions of an episode that a scorer's input constants are taken from."""


@dataclass(frozen=True)
class Episodes:
    """Training traces and the terms on which they are decoded.

    Attributes
    ----------
    model : PreTrainedModel
        The LLM, on kvenv's attention (:func:`kvenv.load_model`).
    source : TraceSource
        Training traces; families joined by ``+`` come in turn.
    interval : int
        W.
    protection : Protection
        Pairs never evicted.
    """

    model: PreTrainedModel
    source: TraceSource
    interval: int
    protection: Protection

    @property
    def layers(self) -> int:
        """Layers of the LLM."""
        return HandedCache(self.model).num_layers

    def scorer(self, features: FeatureSet, hidden: int, depth: int, seed: int) -> Scorer:
        """Return a scorer of random weights for this LLM."""
        shape = HandedCache(self.model)
        width = features.width(shape.head_dim, shape.groups)
        generator = torch.Generator().manual_seed(seed)
        return Scorer(self.layers, shape.kv_heads, width, hidden, depth, generator).to(self.model.device)

    def draw(self, rng: np.random.Generator, count: int, budget: int) -> list[Trace]:
        """Return ``count`` traces, from a drawn id on, and round where the source is finite.

        Raises
        ------
        ValueError
            If one of them can't be decoded with that budget.
        """
        first = int(rng.integers(self.source.size or 1 << 31))
        traces = [self.source[i % (self.source.size or i + 1)] for i in range(first, first + count)]
        limits = Limits(max(len(trace.tokens) for trace in traces), budget, self.interval, True, self.protection)
        for trace in traces:
            limits.check_trace(trace, budget, budget + self.interval)
        return traces

    def future(self, traces: Sequence[Trace], budget: int) -> FutureAttention:
        """Return golden's utilities for a budget."""
        tokens = [trace.tokens for trace in traces]
        return future_attention(self.model, tokens, interval=self.interval, anchors=budget + self.interval)[0]

    def play(self, policy: Policy, traces: Sequence[Trace], budget: int, **options: Any) -> Rollout:
        """Roll a policy out; options are those of :func:`kvenv.rollout`."""
        terms: dict[str, Any] = {"model": self.model, "interval": self.interval, "protection": self.protection}
        return rollout(policy, traces, budget=budget, **terms, **options)

    def calibrate(
        self,
        scorers: Sequence[tuple[Scorer, FeatureSet, Inputs]],
        policy: Policy,
        traces: Sequence[Trace],
        budget: int,
        **options: Any,
    ) -> None:
        """Set scorers' input constants from some decisions all along the episodes of a policy.

        Parameters
        ----------
        scorers : sequence of (Scorer, FeatureSet, Inputs)
            Each with what it sees, and how it takes that in.
        policy, traces, budget
            The episodes; the policy needs what the feature sets need.
        **options
            Those of :func:`kvenv.rollout`.
        """
        windows = -(-(max(len(trace.tokens) for trace in traces) - 1 - budget - self.interval) // self.interval)
        taken = set(np.linspace(0, windows - 1, CALIBRATED_ON).astype(int).tolist())
        made = [0] * self.layers
        filled: list[list[Tensor]] = [[] for _ in made]
        seen: list[list[list[Tensor]]] = [[[] for _ in made] for _ in scorers]

        def keep(state: LayerState, order: Tensor, count: Tensor) -> None:
            if made[state.layer] in taken:
                filled[state.layer].append(state.filled)
                for (_, features, _), layers in zip(scorers, seen):
                    layers[state.layer].append(features.compute(state))
            made[state.layer] += 1

        self.play(policy, traces, budget, on_eviction=keep, **options)
        everywhere = torch.stack([torch.cat(layer) for layer in filled], dim=1)
        for (scorer, _, inputs), layers in zip(scorers, seen):
            scorer.calibrate(torch.stack([torch.cat(layer) for layer in layers], dim=1), everywhere, inputs)
