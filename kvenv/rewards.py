"""Rewards: what a step is paid, from the losses of the window that follows the eviction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvenv.registry import register_reward

SPIKE = 1.5
"""Smallest loss increase in nats that the reward ``foresight`` punishes (eta of ForesightKV's code)."""

LOW_ENTROPY_SHARE = 0.8
"""Share of an episode's scored targets that count as low-entropy (ForesightKV)."""


@dataclass(frozen=True)
class FullLosses:
    """What the full cache made of the same targets (N, S); 0 where padding.

    Attributes
    ----------
    nll, entropy : Tensor (N, S)
        Loss and entropy in nats.
    low_entropy : Tensor (N, S) bool
        The targets among the lower 80% of the episode's scored targets by full-cache entropy.
    low_entropy_count : Tensor (N,) int64
        How many such targets the whole episode has.
    """

    nll: Tensor
    entropy: Tensor
    low_entropy: Tensor
    low_entropy_count: Tensor


@dataclass(frozen=True)
class WindowLosses:
    """What a reward function gets: the targets that one step paid for.

    Shapes: N rows (traces), S targets (W under the schedule ``periodic``, what is left of the longest trace under
    ``prefill``). The full-cache run is made when one of its attributes is first read, and never otherwise.

    Attributes
    ----------
    nll, entropy : Tensor (N, S)
        Loss and entropy in nats under the evicted cache; 0 where padding.
    correct : Tensor (N, S) bool
        Whether the target was the most likely token.
    valid : Tensor (N, S) bool
        False beyond the end of a trace, and everywhere in a row that doesn't step.
    answer : Tensor (N, S) bool
        Whether the target lies in an answer span.
    positions : Tensor (N, S) int64
        Absolute positions of the targets.
    interval : int
        W.
    run_full : callable
        Returns the :class:`FullLosses` of these targets.
    """

    nll: Tensor
    entropy: Tensor
    correct: Tensor
    valid: Tensor
    answer: Tensor
    positions: Tensor
    interval: int
    run_full: Callable[[], FullLosses]

    @cached_property
    def full(self) -> FullLosses:
        """The full cache's losses of the same targets."""
        return self.run_full()

    @property
    def full_is_known(self) -> bool:
        """Whether the full-cache run was asked for."""
        return "full" in self.__dict__

    @property
    def full_nll(self) -> Tensor:
        """Loss (N, S) under the full cache."""
        return self.full.nll

    @property
    def full_entropy(self) -> Tensor:
        """Entropy (N, S) under the full cache."""
        return self.full.entropy

    @property
    def increase(self) -> Tensor:
        """Loss increase (N, S) over the full cache."""
        return self.nll - self.full.nll

    @property
    def spikes(self) -> Tensor:
        """Squared loss increases (N, S) beyond 1.5 nats of low-entropy targets, 0 elsewhere."""
        return torch.where(self.full.low_entropy & (self.increase > SPIKE), self.increase.square(), 0.0)


def lm_loss(losses: WindowLosses) -> Tensor:
    """-(sum of the window's NLL) / W, so that the return is -(total NLL) / W."""
    return -losses.nll.sum(dim=1) / losses.interval


def lm_loss_increase(losses: WindowLosses) -> Tensor:
    """-(sum of the window's NLL minus the full cache's) / W."""
    return -losses.increase.sum(dim=1) / losses.interval


def foresight(losses: WindowLosses) -> Tensor:
    """-(sum of squared loss spikes on low-entropy targets) / (such targets in the episode): ForesightKV's reward."""
    return -losses.spikes.sum(dim=1) / losses.full.low_entropy_count.clamp(min=1)


def answer_loss(losses: WindowLosses) -> Tensor:
    """-(sum of the NLL of the window's answer tokens) / W; 0 where a trace has no answers."""
    return -(losses.nll * losses.answer).sum(dim=1) / losses.interval


register_reward("lm_loss", lm_loss)
register_reward("lm_loss_increase", lm_loss_increase)
register_reward("foresight", foresight)
register_reward("answer_loss", answer_loss)


def low_entropy(entropy: Tensor) -> Tensor:
    """Return which of an episode's scored targets are low-entropy: the lower 80%, at least one.

    Parameters
    ----------
    entropy : Tensor (S,)
        Full-cache entropy of the scored targets, those after the first C.

    Returns
    -------
    Tensor (S,) bool
    """
    kept = max(1, int(LOW_ENTROPY_SHARE * entropy.shape[0]))
    return torch.zeros_like(entropy, dtype=torch.bool).index_fill_(0, entropy.argsort(stable=True)[:kept], True)


def per_token(losses: WindowLosses) -> dict[str, Tensor]:
    """Return every reward term by name, positive, in nats per token of the window: Tensors (N,).

    ``answer_loss`` and ``answer_accuracy`` are per answer token of the window. The full cache's terms are there only if
    something asked for them.
    """
    tokens = losses.valid.sum(dim=1).clamp(min=1)
    answers = losses.answer.sum(dim=1).clamp(min=1)
    terms = {
        "lm_loss": losses.nll.sum(dim=1) / tokens,
        "answer_loss": (losses.nll * losses.answer).sum(dim=1) / answers,
        "answer_accuracy": (losses.correct & losses.answer).sum(dim=1) / answers,
    }
    if losses.full_is_known:
        terms |= {
            "full_lm_loss": losses.full_nll.sum(dim=1) / tokens,
            "full_answer_loss": (losses.full_nll * losses.answer).sum(dim=1) / answers,
            "full_entropy": losses.full_entropy.sum(dim=1) / tokens,
            "lm_loss_increase": losses.increase.sum(dim=1) / tokens,
            "foresight": losses.spikes.sum(dim=1) / tokens,
        }
    return terms
