"""A scorer as a distribution over evictions, and what must be kept of a rollout to learn from it.

Of a decision nothing is kept but the evicted positions, in order, and how likely each pick was: replaying them, layer
by layer and window by window, brings every feature back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from agents.base import Policy, needed
from agents.scorer import ScorerPolicy
from kvenv import plackett_luce
from kvenv.state import LayerState


class Evictions:
    """What went at every decision of a batch of rollouts.

    Parameters
    ----------
    layers, interval : int
        L, and W: the most pairs that one decision evicts.

    Attributes
    ----------
    positions : list of list of Tensor (N, H, W) int32
        Evicted positions by layer and decision, in order, -1 beyond what went.
    log_prob : list of list of Tensor (N, H, W)
        Log-probability of each pick under the policy that made it.
    """

    def __init__(self, layers: int, interval: int) -> None:
        self.interval = interval
        self.positions: list[list[Tensor]] = [[] for _ in range(layers)]
        self.log_prob: list[list[Tensor]] = [[] for _ in range(layers)]

    def decisions(self) -> Tensor:
        """Return in how many decisions (N,) of each row something went, over windows, layers and heads."""
        return torch.stack([(went[..., 0] >= 0).sum(dim=1) for layer in self.positions for went in layer]).sum(dim=0)


class SamplingPolicy(Policy):
    """Evicts by a Plackett-Luce sample: the evict logits are -score / temperature (:mod:`kvenv.plackett_luce`).

    The noise is counter-based: seed and rollout numbers bring the same evictions back.

    Parameters
    ----------
    policy : ScorerPolicy
        Gives the scores.
    temperature : float
        The lower, the more often what scores lowest goes.
    evictions : Evictions, optional
        Where :meth:`record` writes.

    Attributes
    ----------
    seconds : float
        What deciding took so far.
    """

    def __init__(self, policy: ScorerPolicy, temperature: float, evictions: Evictions | None = None) -> None:
        self.policy, self.temperature, self.evictions = policy, temperature, evictions
        self.name, self.needs = f"{policy.name}-sampled", policy.needs | {"noise"}
        self.encode, self.check_model = policy.encode, policy.check_model
        self.seconds = 0.0
        self._logits: Tensor | None = None

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C) whose order is the sample."""
        began = time.perf_counter()
        self._logits = -self.policy(state) / self.temperature
        priorities = plackett_luce.priorities(self._logits, needed(state, "noise"))
        self.seconds += time.perf_counter() - began
        return priorities

    def record(self, state: LayerState, order: Tensor, count: Tensor) -> None:
        """Keep what the decision just made evicts; pass it to :func:`kvenv.rollout` as ``on_eviction``."""
        if self.evictions is None or self._logits is None:
            raise ValueError("record keeps the evictions of this policy's own rollout: give it evictions=")
        interval = self.evictions.interval
        log_prob = plackett_luce.log_prob(self._logits, order, state.mask, count, interval)
        went = torch.arange(interval, device=order.device) < count[..., None]
        positions = state.positions.gather(-1, order[..., :interval])
        self.evictions.positions[state.layer].append(torch.where(went, positions, -1).int())
        self.evictions.log_prob[state.layer].append(log_prob)


class ReplayPolicy(Policy):
    """Evicts what went in earlier rollouts of the same traces, in the same order.

    Parameters
    ----------
    evictions : Evictions
        What goes.
    needs : frozenset of str
        Parts of the state that whoever watches the replay reads.
    length : int
        Tokens of the longest trace.
    """

    def __init__(self, evictions: Evictions, needs: frozenset[str], length: int) -> None:
        self.name, self.needs, self.length = "replay", needs, length
        self._decisions: list[Iterator[Tensor]] = [iter(layer) for layer in evictions.positions]

    def __call__(self, state: LayerState) -> Tensor:
        """Return the place (N, H, C) of each pair in the recorded order; those that stayed come after all others."""
        went = next(self._decisions[state.layer]).long()
        # One entry per position, so that looking a slot up costs nothing; what is no position lands behind the last.
        place = went.new_full((*went.shape[:2], self.length + 1), went.shape[-1])
        order = torch.arange(went.shape[-1], device=went.device).expand_as(went)
        place.scatter_(-1, torch.where(went >= 0, went, self.length), order)
        return place.gather(-1, state.positions.clamp(min=0)).float()
