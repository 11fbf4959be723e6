"""Layer-by-layer rollouts: a whole trace through one forward call, the windows walked inside each layer's attention.

A layer's evictions depend on its own past only and tokens are teacher-forced, so all T tokens can go through a layer's
projections and MLP at once. Exact for any policy that looks at its own layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.cache import SlotCache
from kvenv.decode import Batch, Losses, collate, feed
from kvenv.finite import check_run, lost_rows
from kvenv.golden import FutureAttention
from kvenv.memory import side_by_side
from kvenv.models import check_positions, check_tokens
from kvenv.ranking import eviction_order
from kvenv.state import LayerState, Protection
from kvenv.traces import SCHEDULES, Trace


class Policy(Protocol):
    """What ranks cached pairs: see :mod:`kvenv.state`.

    A policy may have a method ``encode(pairs: kvenv.state.Pairs) -> Tensor (N, H, C, K)`` beside: what it computes of a
    pair that never changes. It is called once for all new pairs of a forward call, and the decisions find the result in
    ``state.encoded``, slot by slot; where that is None, the policy makes it from the state, which is a ``Pairs``.

    It may have a method ``check_model(model: PreTrainedModel) -> None`` that raises a ValueError with the reason if it
    can't serve a model: rollouts, ``EvictingCache``, evaluation and ``policy_action`` call it before anything runs.
    """

    name: str
    needs: frozenset[str]

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C); higher means keep."""
        ...


@dataclass(frozen=True)
class Rollout:
    """What a policy did to a batch of traces.

    Attributes
    ----------
    losses : Losses
        Per target: entry t - 1 belongs to target t; (N, T - 1) with T the longest trace, zero beyond a trace's end.
    agreement : Tensor (N,) or None
        Share of evicted pairs that golden would have evicted from the same state, over decisions, layers and heads.
    """

    losses: Losses
    agreement: Tensor | None


Hook = Callable[[LayerState, Tensor, Tensor], None]
"""Called with (state, order, count) at each decision of each layer."""

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 65_536}
"""Tokens fed in one call of the model: a CPU's caches hold the activations of no more, a GPU's memory does."""


class Agreement:
    """Counts how many evictions golden would have shared, from the same states."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.shared = torch.zeros(rows, device=device)
        self.evicted = torch.zeros(rows, device=device)

    def __call__(self, state: LayerState, order: Tensor, count: Tensor) -> None:
        """Take in one decision of one layer: its eviction order and how many go."""
        if state.future is None:
            return
        golden = eviction_order(state.future, state.positions, state.mask)
        place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        rank, golden_rank = (torch.empty_like(o).scatter_(-1, o, place) for o in (order, golden))
        shared = torch.maximum(rank, golden_rank) < count[..., None]
        self.shared += shared.sum(dim=(1, 2))
        self.evicted += count.sum(dim=1)

    def mean(self) -> Tensor:
        """Return the share per row; 1 where nothing was evicted."""
        return torch.where(self.evicted > 0, self.shared / self.evicted.clamp(min=1), 1.0)


def check_budget(budget: int, protection: Protection, trace: Trace, interval: int) -> None:
    """Refuse budgets that leave a trace nothing to decide.

    Raises
    ------
    ValueError
        If budget or interval are below 1, or the protected pairs don't fit in the budget.
    """
    for name, value in (("budget", budget), ("interval", interval)):
        if value < 1:
            raise ValueError(f"{name} {value} is impossible: it must be at least 1")
    protected = protection.size(trace.prompt_length)
    if budget < protected:
        raise ValueError(
            f"budget {budget} is less than the {protected} protected pairs of trace {trace.name!r} "
            f"(sinks {protection.sinks}, recent {protection.recent}"
            + (f", prompt {trace.prompt_length}" if protection.prompt else "")
            + f"): raise the budget to at least {protected} or protect less"
        )


def first_decisions(traces: Sequence[Trace], *, budget: int, interval: int, schedule: str = "periodic") -> list[int]:
    """Return the position before which each trace's first decision falls: B + W, or the end of its prompt.

    Raises
    ------
    ValueError
        If the schedule is unknown, or there is no prompt to be evicted from.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: known are {', '.join(SCHEDULES)}")
    if schedule == "periodic":
        return [budget + interval] * len(traces)
    for trace in traces:
        if not trace.prompt_length:
            raise ValueError(f"trace {trace.name!r} has no prompt: schedule 'prefill' evicts from the prompt only")
    return [trace.prompt_length for trace in traces]


def rollout(
    policy: Policy,
    traces: Sequence[Trace],
    *,
    model: PreTrainedModel,
    budget: int,
    interval: int,
    schedule: str = "periodic",
    protection: Protection | None = None,
    future: FutureAttention | None = None,
    expected_future: FutureAttention | None = None,
    agreement: bool = False,
    seed: int = 0,
    rollouts: Sequence[int] | None = None,
    on_eviction: Hook | None = None,
) -> Rollout:
    """Decode traces under a policy, all windows in one forward call.

    Parameters
    ----------
    policy : Policy
        Ranks the candidates of each layer at each decision.
    traces : sequence of Trace
        Decoded side by side.
    model : PreTrainedModel
        A causal LM on kvenv's attention (:func:`kvenv.load_model`).
    budget, interval : int
        B and W: a decision falls due when B + W pairs are cached.
    schedule : {"periodic", "prefill"}
        Under ``prefill`` there is one decision, at the end of each trace's prompt; the rest is never evicted.
    protection : Protection, optional
        Pairs never evicted; if not given, the first 4 and the newest W.
    future, expected_future : FutureAttention, optional
        For policies that need them, and for ``agreement``.
    agreement : bool
        Whether to compare with golden; needs ``future``.
    seed : int
        Seed of the noise.
    rollouts : sequence of int, optional
        Rollout number of each row, for the noise; 0, 1, ... if not given.
    on_eviction : callable, optional
        Called with (state, order, count) at each decision of each layer.

    Returns
    -------
    Rollout

    Raises
    ------
    ValueError
        If there is no trace, one is longer than the model's positions or has tokens that it doesn't know, the model
        isn't on kvenv's attention or is refused by the policy, a budget is impossible or a policy's need is missing.
    FloatingPointError
        If the LLM's logits are NaN or infinite, or the policy's priorities NaN, with trace and layer; that is looked at
        once, at the end.
    MemoryError
        If memory runs out; it names rows and tokens.
    """
    if not traces:
        raise ValueError("traces are none: give at least one")
    longest = max(len(trace.tokens) for trace in traces)
    check_positions(model, longest, type(model).__name__)
    protection = protection or Protection(recent=interval)
    for trace in traces:
        check_budget(budget, protection, trace, interval)
        check_tokens(model, trace.tokens, f"trace {trace.name!r}")
    for need, given in (("future", future), ("expected_future", expected_future)):
        if need in policy.needs and given is None:
            raise ValueError(f"policy {policy.name!r} needs {need}: pass {need}=")
    if agreement and future is None:
        raise ValueError("agreement compares with golden, which needs the future: pass future=")
    anchors = first_decisions(traces, budget=budget, interval=interval, schedule=schedule)
    first_decision = max(anchors) + -max(anchors) % interval
    with side_by_side(len(traces), longest):
        batch = collate(
            [trace.tokens for trace in traces],
            prompt_lengths=[trace.prompt_length for trace in traces],
            anchors=anchors,
            interval=interval,
            device=model.device,
        )
        cache = SlotCache(
            model,
            rows=len(traces),
            capacity=budget + interval if schedule == "periodic" else batch.tokens.shape[1],
            interval=interval,
            budget=budget,
            protection=protection,
            policy=policy,
            first_decision=first_decision,
            last_decision=math.inf if schedule == "periodic" else first_decision,
            seed=seed,
        )
        cache.prompt_length = batch.prompt_length
        if rollouts is not None:
            cache.rollout = torch.as_tensor(rollouts, device=model.device)
        cache.future, cache.expected_future = future, expected_future
        counter = Agreement(len(traces), model.device) if agreement else None
        cache.on_eviction = _all_of([hook for hook in (counter, on_eviction) if hook is not None])
        losses = _feed_in_parts(model, cache, batch, interval)
        aligned = Losses(*(batch.by_position(x, longest - 1) for x in (losses.nll, losses.entropy, losses.correct)))
    check_run(policy.name, [trace.name for trace in traces], lost_rows(aligned.nll, aligned.entropy), cache.unranked)
    return Rollout(aligned, counter.mean() if counter else None)


def _all_of(hooks: Sequence[Hook]) -> Hook | None:
    """Return a hook that calls all of them in turn; None if there are none."""
    if not hooks:
        return None

    def call(state: LayerState, order: Tensor, count: Tensor) -> None:
        for hook in hooks:
            hook(state, order, count)

    return call


def _feed_in_parts(model: PreTrainedModel, cache: SlotCache, batch: Batch, interval: int) -> Losses:
    """Feed a batch in calls of whole windows whose activations stay small, and score its targets."""
    at_once = TOKENS_AT_ONCE["cpu" if model.device.type == "cpu" else "cuda"]
    at_once = max(at_once // (len(batch.tokens) * interval), 1) * interval
    parts = []
    for part in zip(*(x.split(at_once, dim=1) for x in (batch.tokens, batch.targets, batch.positions, batch.valid))):
        parts.append(feed(model, cache, *part))
        # Which columns decide is told by the column of the call.
        cache.first_decision, cache.last_decision = cache.first_decision - at_once, cache.last_decision - at_once
    return Losses(*(torch.cat([getattr(part, x) for part in parts], 1) for x in ("nll", "entropy", "correct")))
