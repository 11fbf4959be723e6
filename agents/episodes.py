"""Rollouts that agents learn from: which traces, decoded how, and the constants that a scorer takes from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from agents.scorer import Inputs, Scorer
from kvenv.attention import HandedCache
from kvenv.features import FeatureSet
from kvenv.golden import FutureAttention, future_attention
from kvenv.identity import ModelIdentity
from kvenv.layerwise import Policy, Rollout, rollout
from kvenv.limits import Limits
from kvenv.models import check_positions, check_tokens
from kvenv.state import LayerState, Protection
from kvenv.traces import Trace, TraceSource

CALIBRATED_ON = 4
"""Decisions of an episode that a scorer's input constants are taken from."""

CALIBRATED_PAIRS = 8192
"""Pairs of a (layer, KV head) that they are taken from at most: a median needs no more, and memory has an end."""


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

    def trained_for(self, budgets: Sequence[int]) -> dict[str, Any]:
        """Return what a policy that learns here says it was trained for: the LLM, budgets and the interval."""
        return {"model": ModelIdentity.of(self.model), "budgets": budgets, "interval": self.interval}

    def scorer(self, features: FeatureSet, hidden: int, depth: int, seed: int) -> Scorer:
        """Return a scorer of random weights for this LLM."""
        shape = HandedCache(self.model)
        width = features.width(shape.head_dim, shape.groups)
        generator = torch.Generator().manual_seed(seed)
        return Scorer(self.layers, shape.kv_heads, width, hidden, depth, generator).to(self.model.device)

    def check(self, budgets: Sequence[int]) -> None:
        """Refuse what would show only when an update draws it: a budget, or one of the traces of a finite source.

        Raises
        ------
        ValueError
            If a budget is less than what is protected, or traces can't be decoded with one; it says how many.
        """
        traces = [self.source[i] for i in range(self.source.size or 0)]
        longest = max((len(trace.tokens) for trace in traces), default=0)
        check_positions(self.model, longest, type(self.model).__name__)
        for trace in traces:
            check_tokens(self.model, trace.tokens, f"trace {trace.name!r}")
        for budget in sorted(budgets, reverse=True):
            Limits(max(longest, 2), budget, self.interval, True, self.protection).check_traces(traces)

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
            check_tokens(self.model, trace.tokens, f"trace {trace.name!r}")
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
        at_once: int = 0,
        **options: Any,
    ) -> None:
        """Set scorers' input constants from some pairs at some decisions all along the episodes of a policy.

        Which pairs doesn't depend on how many traces are rolled out side by side.

        Parameters
        ----------
        scorers : sequence of (Scorer, FeatureSet, Inputs)
            Each with what it sees, and how it takes that in.
        policy, traces, budget
            The episodes; the policy needs what the feature sets need.
        at_once : int
            Traces that are rolled out side by side, 0 for all.
        **options
            Those of :func:`kvenv.rollout`.
        """
        taken = self._taken(traces, budget)
        device = self.model.device
        slots = _drawn(len(taken), budget + self.interval).to(device)
        seen = [
            torch.empty(len(slots), *scorer.shape[:2], slots.shape[1], scorer.shape[2], device=device)
            for scorer, *_ in scorers
        ]

        def keep(first: int, made: list[int], state: LayerState, order: Tensor, count: Tensor) -> None:
            decided = [(made[state.layer], first + row) for row in range(len(state.filled))]
            made[state.layer] += 1
            if not taken.keys().isdisjoint(decided):
                for (_, features, _), pairs in zip(scorers, seen):
                    computed = features.compute(state)
                    for row, decision in enumerate(decided):
                        if decision in taken:
                            pairs[taken[decision], state.layer] = computed[row][:, slots[taken[decision]]]

        size = at_once or len(traces)
        for first in range(0, len(traces), size):
            part, hook = traces[first : first + size], partial(keep, first, [0] * self.layers)
            self.play(policy, part, budget, rollouts=range(first, first + len(part)), on_eviction=hook, **options)
        for (scorer, _, inputs), pairs in zip(scorers, seen):
            # Before a trace has ended, every slot is filled when a decision falls due.
            scorer.calibrate(pairs, torch.ones(pairs.shape[:-1], dtype=torch.bool, device=device), inputs)

    def _taken(self, traces: Sequence[Trace], budget: int) -> dict[tuple[int, int], int]:
        """Number the decisions (window, row) that constants are taken from: some of each trace's own."""
        chosen = set()
        for row, trace in enumerate(traces):
            windows = -(-(len(trace.tokens) - 1 - budget - self.interval) // self.interval)
            chosen |= {(int(window), row) for window in np.linspace(0, windows - 1, CALIBRATED_ON).astype(int)}
        return {decision: number for number, decision in enumerate(sorted(chosen))}


def _drawn(decisions: int, capacity: int) -> Tensor:
    """Return the slots (decisions, K) that constants are taken from: all, or as many as there may be, at random."""
    kept = min(capacity, max(1, CALIBRATED_PAIRS // decisions))
    rngs = (np.random.default_rng(decision) for decision in range(decisions))
    return torch.as_tensor(np.stack([np.sort(rng.choice(capacity, kept, replace=False)) for rng in rngs]))
