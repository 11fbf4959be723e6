"""Layer-by-layer rollouts: a whole trace through one forward call, the windows walked inside each layer's attention.

A layer's evictions depend on its own past only and tokens are teacher-forced, so all T tokens can go through a layer's
projections and MLP at once. Exact for any policy that looks at its own layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.cache import EvictingCache
from kvenv.decode import Losses, collate, feed
from kvenv.golden import FutureAttention
from kvenv.ranking import eviction_order
from kvenv.state import LayerState, Protection
from kvenv.traces import Trace


class Policy(Protocol):
    """What ranks cached pairs: see :mod:`kvenv.state`."""

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
        Share of evicted pairs that golden would have evicted from the same state, mean over decisions, layers and heads.
    """

    losses: Losses
    agreement: Tensor | None


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
        If the protected pairs don't fit in the budget.
    """
    protected = protection.size(trace.prompt_length)
    if budget < protected:
        raise ValueError(
            f"budget {budget} is less than the {protected} protected pairs of trace {trace.name!r} "
            f"(sinks {protection.sinks}, recent {protection.recent}"
            + (f", prompt {trace.prompt_length}" if protection.prompt else "")
            + f"): raise the budget to at least {protected} or protect less"
        )


def rollout(
    policy: Policy,
    traces: Sequence[Trace],
    *,
    model: PreTrainedModel,
    budget: int,
    interval: int,
    protection: Protection | None = None,
    future: FutureAttention | None = None,
    expected_future: FutureAttention | None = None,
    agreement: bool = False,
    seed: int = 0,
    rollouts: Sequence[int] | None = None,
    on_eviction: Callable[[LayerState, Tensor, Tensor], None] | None = None,
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
    protection : Protection, optional
        Pairs never evicted.
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
        If a budget is impossible or a policy's need is missing.
    """
    protection = protection or Protection()
    for trace in traces:
        check_budget(budget, protection, trace, interval)
    for need, given in (("future", future), ("expected_future", expected_future)):
        if need in policy.needs and given is None:
            raise ValueError(f"policy {policy.name!r} needs {need}: pass {need}=")
    capacity = budget + interval
    batch = collate(
        [trace.tokens for trace in traces],
        prompt_lengths=[trace.prompt_length for trace in traces],
        anchors=capacity,
        interval=interval,
        device=model.device,
    )
    cache = EvictingCache(
        model,
        rows=len(traces),
        capacity=capacity,
        interval=interval,
        budget=budget,
        needs=policy.needs,
        protection=protection,
        policy=policy,
        first_decision=capacity + int(-capacity % interval),
        seed=seed,
    )
    cache.prompt_length = batch.prompt_length
    if rollouts is not None:
        cache.rollout = torch.as_tensor(rollouts, device=model.device)
    cache.future, cache.expected_future = future, expected_future
    counter = Agreement(len(traces), model.device) if agreement else None
    hooks = [hook for hook in (counter, on_eviction) if hook is not None]
    cache.on_eviction = (lambda *decision: [hook(*decision) for hook in hooks] and None) if hooks else None
    losses = feed(model, cache, batch.tokens, batch.targets, batch.positions, batch.valid)
    length = max(len(trace.tokens) for trace in traces) - 1
    aligned = Losses(*(batch.by_position(x, length) for x in (losses.nll, losses.entropy, losses.correct)))
    return Rollout(aligned, counter.mean() if counter else None)
