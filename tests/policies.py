"""Policies and drivers that the tests of the core share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.attention import use_kvenv_attention
from kvenv.cache import SlotCache
from kvenv.decode import Batch, collate, feed
from kvenv.golden import FutureAttention
from kvenv.state import LayerState, Protection
from kvenv.traces import Trace
from tests.models import random_model
from tests.reference import NEVER


def kvenv_model(architecture: str = "qwen3", dtype: torch.dtype = torch.float64, **options: int) -> PreTrainedModel:
    """Return a random model on kvenv's attention."""
    model = random_model(architecture, dtype, **options)
    use_kvenv_attention(model)
    return model


def random_traces(lengths: Sequence[int], *, seed: int = 0, vocabulary: int = 64) -> list[Trace]:
    """Return traces of random tokens."""
    rng = np.random.default_rng(seed)
    return [Trace(rng.integers(3, vocabulary, length), 0, (), f"random/{i}") for i, length in enumerate(lengths)]


class Random:
    """Keeps pairs at random."""

    name = "random"
    needs = frozenset({"noise"})

    def __call__(self, state: LayerState) -> Tensor:
        """Return the noise."""
        return state.noise


class Mixed:
    """Looks at everything that its needs name, and at noise, keys and values."""

    name = "mixed"

    def __init__(self, *needs: str) -> None:
        self.needs = frozenset({"noise", *needs})

    def __call__(self, state: LayerState) -> Tensor:
        """Return a sum of one term for each need."""
        score = state.noise.double() + state.keys.sum(-1).tanh() * state.values.sum(-1).tanh()
        if "stats" in self.needs:
            score = score + state.stats.double().mean(dim=2) @ torch.linspace(1.0, 2.0, 8).double()
        if "last_attention" in self.needs:
            score = score + state.last_attention.amax(dim=2)
        if "queries" in self.needs:
            logits = torch.einsum("nhgwd,nhcd->nhgwc", state.queries, state.keys).tanh()
            score = score + (logits * state.query_valid[:, None, None, :, None]).sum(dim=(2, 3))
        if "query_moments" in self.needs:
            ahead = state.rotary.rotate(state.query_mean, state.next_position[:, None, None] + 3)
            score = score + torch.einsum("nhgd,nhcd->nhc", ahead, state.keys.to(ahead.dtype)).tanh()
            score = score + torch.einsum("nhgde,nhcd,nhce->nhc", state.query_cov, state.keys, state.keys).tanh()
        for need in {"future", "expected_future"} & self.needs:
            score = score + 3 * getattr(state, need)
        return score


class Recorder:
    """Remembers at which position every pair was evicted; an ``on_eviction`` hook.

    Attributes
    ----------
    lost_at : Tensor (L, N, H, T) int64
        Position of the first query after the eviction.
    """

    def __init__(self, model: PreTrainedModel, traces: Sequence[Trace]) -> None:
        config = model.config
        length = max(len(trace.tokens) for trace in traces)
        self.lost_at = torch.full((config.num_hidden_layers, len(traces), config.num_key_value_heads, length), NEVER)

    def __call__(self, state: LayerState, order: Tensor, count: Tensor) -> None:
        """Take in one decision of one layer."""
        held = state.positions.gather(-1, order)
        gone = torch.arange(order.shape[-1]) < count[..., None]
        self.note(state.layer, torch.where(gone, held, -1), state.next_position)

    def note(self, layer: int, evicted: Tensor, next_position: Tensor) -> None:
        """Take in evicted positions (N, H, E), -1 for none."""
        for row, head, at in (evicted >= 0).nonzero().tolist():
            position = int(evicted[row, head, at])
            assert self.lost_at[layer, row, head, position] == NEVER, "evicted twice"
            self.lost_at[layer, row, head, position] = next_position[row]

    def of(self, row: int, trace: Trace) -> Tensor:
        """Return what a row lost (L, H, T)."""
        return self.lost_at[:, row, :, : len(trace.tokens) - 1]


def step_through(
    policy: Callable[[LayerState], Tensor] | Random | Mixed,
    traces: Sequence[Trace],
    *,
    model: PreTrainedModel,
    budget: int,
    interval: int,
    protection: Protection,
    future: FutureAttention | None = None,
    seed: int = 0,
    between: Callable[[SlotCache], None] = lambda cache: None,
) -> tuple[Tensor, Recorder, SlotCache]:
    """Decode by stepping, as the environment does: evict, feed a window, evict, ...; ``between`` windows do more.

    Returns
    -------
    Tensor (N, T - 1), Recorder, SlotCache
        Losses per target, what was evicted, and the cache in the end.
    """
    capacity = budget + interval
    batch: Batch = collate([trace.tokens for trace in traces], anchors=capacity, interval=interval)
    cache = SlotCache(
        model,
        rows=len(traces),
        capacity=capacity,
        interval=interval,
        budget=budget,
        needs=policy.needs,
        protection=protection,
        seed=seed,
    )
    cache.future = future
    recorder = Recorder(model, traces)
    first = capacity + -capacity % interval
    parts = []
    for start in (0, *range(first, batch.tokens.shape[1], interval)):
        stop = start + interval if start else first
        window = [x[:, start:stop] for x in (batch.tokens, batch.targets, batch.positions, batch.valid)]
        if start:
            states = [cache.layer_state(layer) for layer in range(cache.num_layers)]
            priorities = torch.stack([policy(state) for state in states])
            upcoming = cache.next_position.clone()
            evicted = cache.evict(priorities, window[3].any(dim=1), interval)
            for layer in range(cache.num_layers):
                recorder.note(layer, evicted[layer], upcoming)
            between(cache)
        parts.append(feed(model, cache, *window).nll)
    losses = batch.by_position(torch.cat(parts, dim=1), max(len(trace.tokens) for trace in traces) - 1)
    return losses, recorder, cache
