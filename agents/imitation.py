"""Imitation of Golden Eviction: rank cached pairs as the expert does (ForesightKV, arXiv 2602.03203, stage 1; DAgger).

At every decision golden labels the pairs; golden, or with DAgger the scorer itself, evicts and the environment goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from agents.checkpoint import optimizer_state, restore_optimizer
from agents.learner import Learner, State
from agents.scorer import Inputs, Scorer, ScorerPolicy
from kvenv import plackett_luce
from kvenv.golden import FutureAttention, future_attention
from kvenv.ranking import action_from_order, eviction_order
from kvenv.vector_env import KVEvictVectorEnv

CALIBRATED_ON = 4
"""Decisions of a golden episode that the scorer's input constants are taken from."""

LossName = Literal["pairwise-weighted", "pairwise", "regression", "listwise", "likelihood"]


@dataclass(frozen=True)
class ImitationConfig:
    """Hyper-parameters of imitation."""

    updates: int = 500
    """Gradient steps; each takes one decision of every row."""
    loss: LossName = "pairwise-weighted"
    """How golden's order is learnt: a hinge on pairs, weighted by how much their order matters or all alike
    (ForesightKV's paper), regression on the logarithm of the utility, shares of utility as a distribution (ListNet), or
    the likelihood of golden's order under the Plackett-Luce model (ListMLE)."""
    learning_rate: float = 1e-2
    """Adam's step size after the warm-up; falls to a tenth by a cosine."""
    warmup: int = 10
    """Updates of linear warm-up."""
    margin: float = 0.1
    """How much higher the better of two pairs must score in the pairwise losses (0.01 in the paper's code)."""
    hidden: int = 64
    """Hidden units of the scorer (16 in the paper's code)."""
    inputs: Inputs = "squashed"
    """How the scorer takes features in: squashed by the inverse hyperbolic sine and standardised, standardised only, or
    raw, which costs a scorer that sees the position most of what it can; see experiments/results."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    budgets: tuple[int, ...] = ()
    """Budgets that episodes are drawn from, none above the environment's; its own alone if empty."""
    dagger: float = 0.0
    """Share of episodes in which the scorer evicts (DAgger); golden does in the others. Labels are always golden's."""
    dagger_ramp: int = 100
    """Updates over which that share rises from 0."""
    seed: int = 0
    """Seed of the initial weights and of the episodes."""


PRESETS = {
    "foresightkv": ImitationConfig(updates=1000, loss="pairwise", learning_rate=1e-2, margin=0.01, hidden=16),
}
"""Published hyper-parameters, from the papers' code where it is public."""


def pairwise_hinge(scores: Tensor, utility: Tensor, mask: Tensor, margin: float, weighted: bool = True) -> Tensor:
    """Return the pairwise ranking hinge loss.

    Weighted, a pair counts by the difference of the square roots of its two utilities: the order among pairs that
    nobody will look at decides nothing, and unweighted they are nearly all there is.

    Parameters
    ----------
    scores, utility : Tensor (..., C)
        The scorer's output and golden's utility.
    mask : Tensor (..., C) bool
        Candidates.
    margin : float
        How much higher the better of two pairs must score.
    weighted : bool
        Whether pairs count by how much their order matters.

    Returns
    -------
    Tensor ()
        Mean over the ordered pairs of candidates with different utilities.
    """
    root = utility.to(scores.dtype).clamp(min=0).sqrt()
    weight = (root[..., :, None] - root[..., None, :]).clamp(min=0)
    weight = weight * (mask[..., :, None] & mask[..., None, :])
    if not weighted:
        weight = (weight > 0).to(scores.dtype)
    short = (margin - (scores[..., :, None] - scores[..., None, :])).clamp(min=0)
    return (weight * short).sum() / weight.sum().clamp(min=1e-8)


def regression(scores: Tensor, utility: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error on log(utility + 1e-4), both sides less their mean over the decision's candidates.

    An offset that all pairs of a decision share changes no ranking. Parameters are those of :func:`pairwise_hinge`.
    """
    error = scores - (utility.to(scores.dtype).clamp(min=0) + 1e-4).log()
    count = mask.sum(dim=-1, keepdim=True).clamp(min=1)
    centred = error - torch.where(mask, error, 0.0).sum(dim=-1, keepdim=True) / count
    return torch.where(mask, centred**2, 0.0).sum() / mask.sum().clamp(min=1)


def listwise(scores: Tensor, utility: Tensor, mask: Tensor) -> Tensor:
    """Return the divergence of the scores' softmax from golden's shares of utility (ListNet, Cao et al. 2007).

    Shares are those of the square roots, as in the weighted hinge. Parameters are those of :func:`pairwise_hinge`;
    the result is in nats, the mean over decisions.
    """
    root = torch.where(mask, utility.to(scores.dtype).clamp(min=0).sqrt() + 1e-6, 0.0)
    share = root / root.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    logs = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 4).log_softmax(dim=-1)
    divergence = torch.where(mask, share * (share.clamp(min=1e-12).log() - logs), 0.0).sum(dim=-1)
    return divergence.sum() / mask.any(dim=-1).sum().clamp(min=1)


def likelihood(scores: Tensor, utility: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Return minus the log-likelihood per pick of golden's order under Plackett-Luce (ListMLE, Xia et al. 2008).

    Parameters are those of :func:`pairwise_hinge`, and ``positions`` (..., C) break ties; in nats.
    """
    order, picks = eviction_order(utility, positions, mask), mask.sum(dim=-1)
    logs = plackett_luce.log_prob(-scores, order, mask, picks, mask.shape[-1])
    return -logs.sum() / picks.sum().clamp(min=1)


class Student:
    """A scorer that learns golden's order from decisions it is shown.

    Parameters
    ----------
    shape : tuple (L, H, F)
        Layers, KV heads, features.
    config : ImitationConfig
        Hyper-parameters.
    device : torch.device
        Where it learns.
    """

    def __init__(self, shape: tuple[int, int, int], config: ImitationConfig, device: torch.device) -> None:
        self.config, self.done = config, 0
        generator = torch.Generator().manual_seed(config.seed)
        self.scorer = Scorer(*shape, config.hidden, generator).to(device)
        self.optimizer = torch.optim.Adam(self.scorer.parameters(), lr=config.learning_rate)

    def learn(self, scores: Tensor, utility: Tensor, mask: Tensor, positions: Tensor) -> dict[str, float]:
        """Take a gradient step on its scores of some decisions, all (N, L, H, C), and return the metrics."""
        loss = LOSSES[self.config.loss](scores, utility, mask, positions, self.config.margin)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.scorer.parameters(), self.config.grad_clip)
        rate = self.config.learning_rate * self._rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.done += 1
        return {"loss/ranking": float(loss.detach()), "loss/grad_norm": float(norm), "loss/learning_rate": rate}

    def _rate(self, update: int) -> float:
        """Factor on the learning rate: linear warm-up, then a cosine down to a tenth."""
        warmup, updates = self.config.warmup, self.config.updates
        if update < warmup:
            return (update + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (update - warmup) / max(1, updates - warmup)))


class ImitationLearner(Learner):
    """Trains a scorer to rank cached pairs as Golden Eviction does.

    All rows begin their episodes together, and everything about these episodes follows from the seed and their number:
    a checkpoint holds the actions of the episodes under way, and replaying them brings the environment back.

    Parameters
    ----------
    env : KVEvictVectorEnv
        With ``output="torch"`` and ``autoreset_mode="Disabled"``. Its feature set is what the scorer sees.
    config : ImitationConfig, optional
        Hyper-parameters.

    Raises
    ------
    ValueError
        If the environment is set up otherwise, or a hyper-parameter is impossible.
    """

    name = "imitation"

    def __init__(self, env: KVEvictVectorEnv, config: ImitationConfig | None = None) -> None:
        self.env, self.config = env, config or ImitationConfig()
        self._check()
        layers, heads, _, width = env.feature_shape
        self.student = Student((layers, heads, width), self.config, env.dynamics.model.device)
        self.scorer, self.optimizer = self.student.scorer, self.student.optimizer
        self.episode = self._began = 0
        self._actions: list[Tensor] = []
        self._running = torch.zeros(env.num_envs, dtype=torch.bool)

    @property
    def done(self) -> int:  # type: ignore[override]
        """Updates made so far."""
        return self.student.done

    @property
    def policy(self) -> ScorerPolicy:
        """The policy as trained so far."""
        training = {"learner": self.name, "updates_done": self.done, **asdict(self.config)}
        return ScorerPolicy(self.scorer, self.env.features, self.name, training)

    def update(self) -> dict[str, float]:
        """Learn from one decision of every row, let its leader take it, and return the metrics."""
        began = time.perf_counter()
        if not self._running.any():
            if not self.done:
                self._calibrate()
            self._begin()
        reset = time.perf_counter()
        utility, mask, positions = self._utility(), self._mask(), self._observation["positions"]
        scores = self.scorer(self._observation["features"])
        priorities = torch.where(self._led[:, None, None, None], scores.detach().to(utility.dtype), utility)
        action = action_from_order(eviction_order(priorities, positions, mask), mask)
        acted = time.perf_counter()
        metrics = self._learn(scores, utility, mask & self._running.to(mask.device)[:, None, None, None])
        learnt = time.perf_counter()
        self._step(action)
        metrics |= {
            "time/policy": acted - reset,
            "time/learn": learnt - acted,
            "time/env": time.perf_counter() - learnt + reset - began,
        }
        return metrics if self._running.any() else metrics | {"rollout/ep_rew_mean": float(self._return.mean())}

    def state(self) -> State:
        """Return weights, moments and the actions of the episodes under way."""
        tensors = {f"scorer.{name}": tensor.detach().clone() for name, tensor in self.scorer.state_dict().items()}
        tensors |= optimizer_state(self.optimizer)
        if self._running.any():
            tensors["actions"] = torch.stack(self._actions)
        return State(tensors, {"learner": self.name, "done": self.done, "episode": self.episode, "began": self._began})

    def restore(self, state: State) -> None:
        """Go on from a state: load, and replay the episodes under way.

        Raises
        ------
        ValueError
            If the state is of another learner or other shapes.
        """
        if state.values.get("learner") != self.name:
            raise ValueError(f"the state is of learner {state.values.get('learner')!r}, not {self.name!r}")
        prefix = "scorer."
        weights = {key.removeprefix(prefix): x for key, x in state.tensors.items() if key.startswith(prefix)}
        try:
            self.scorer.load_state_dict(weights)
            self.student.done, self._began = int(state.values["done"]), int(state.values["began"])
            episode = int(state.values["episode"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the state doesn't fit this scorer: {error}") from error
        self.optimizer.state.clear()
        restore_optimizer(self.optimizer, state.tensors)
        self.episode, self._actions = episode, []
        self._running = torch.zeros_like(self._running)
        actions = state.tensors.get("actions")
        if actions is not None:
            self.episode -= 1
            self._start()
            for action in actions.to(self.scorer.first.device):
                self._step(action)

    def _check(self) -> None:
        """Refuse what can't work."""
        if self.env.output != "torch" or self.env.autoreset_mode != "Disabled":
            raise ValueError(
                "imitation needs an environment with output='torch' and autoreset_mode='Disabled', "
                f"not {self.env.output!r} and {self.env.autoreset_mode!r}"
            )
        config = self.config
        if not 0 <= config.dagger <= 1:
            raise ValueError(f"dagger {config.dagger} is no share: choose 0 to 1")
        if config.loss not in LOSSES:
            raise ValueError(f"unknown loss {config.loss!r}: known are {', '.join(LOSSES)}")
        most = self.env.dynamics.limits.budget
        if config.budgets and max(config.budgets) > most:
            raise ValueError(f"budgets {config.budgets} exceed the environment's budget {most}: raise --budget")

    def _begin(self) -> None:
        """Begin the next episodes."""
        self._began, self._actions = self.done, []
        self._start()

    def _start(self) -> None:
        """Begin the episodes of number ``episode``: traces, budgets and leaders are drawn from seed and number."""
        rng, rows = np.random.default_rng([self.config.seed, self.episode]), self.env.num_envs
        seeds = rng.integers(2**31, size=rows).tolist()
        budgets = rng.choice(self.config.budgets or (self.env.dynamics.limits.budget,), size=rows).tolist()
        share = self.config.dagger * min(1.0, self._began / max(1, self.config.dagger_ramp))
        self._reset(seeds, budgets, torch.as_tensor(rng.random(rows) < share))
        self.episode += 1

    def _reset(self, seeds: list[int], budgets: list[int], led: Tensor) -> None:
        """Reset all rows and look into their futures, together: how rows are batched changes last bits."""
        self._observation, info = self.env.reset(seed=seeds, options={"budget": budgets})
        dynamics, self._position = self.env.dynamics, info["position"]
        self._led = led.to(dynamics.model.device)
        self._running = torch.ones(self.env.num_envs, dtype=torch.bool)
        self._return = torch.zeros(self.env.num_envs, dtype=torch.float64)
        self._future: FutureAttention = future_attention(
            dynamics.model,
            [dynamics.source[int(trace)].tokens for trace in info["trace"]],
            interval=dynamics.limits.interval,
            anchors=self._position.tolist(),
        )[0]

    def _step(self, action: Tensor) -> None:
        """Execute an action (N, L, H, C)."""
        self._observation, reward, terminated, truncated, info = self.env.step(action)
        self._running, self._position = ~(terminated | truncated).cpu(), info["position"]
        self._return += reward.cpu()
        self._actions.append(action.cpu())

    def _calibrate(self) -> None:
        """Take the scorer's input constants from an episode that golden leads, of its own seed."""
        rng, rows = np.random.default_rng([self.config.seed, 2**32]), self.env.num_envs
        budgets = rng.choice(self.config.budgets or (self.env.dynamics.limits.budget,), size=rows).tolist()
        self._reset(rng.integers(2**31, size=rows).tolist(), budgets, torch.zeros(rows, dtype=torch.bool))
        limits = self.env.dynamics.limits
        decisions = -(-(limits.trace_length - int(self._position.max())) // limits.interval)
        taken = np.unique(np.linspace(0, max(0, decisions - 1), CALIBRATED_ON).astype(int))
        seen = []
        for decision in range(int(taken[-1]) + 1):
            if decision in taken:
                seen.append((self._observation["features"], self._observation["positions"] >= 0))
            mask, positions = self._mask(), self._observation["positions"]
            self._step(action_from_order(eviction_order(self._utility(), positions, mask), mask))
        self._take_in(*(torch.cat(parts) for parts in zip(*seen, strict=True)))

    def _mask(self) -> Tensor:
        """Return the candidates (N, L, H, C)."""
        return self._observation["mask"].bool()

    def _utility(self) -> Tensor:
        """Return golden's utilities (N, L, H, C) at the current decision."""
        positions = self._observation["positions"]
        at = torch.as_tensor(self._position, device=positions.device)
        layers = range(positions.shape[1])
        return torch.stack([self._future.at(layer, positions[:, layer], at) for layer in layers], dim=1)

    def _take_in(self, features: Tensor, filled: Tensor) -> None:
        """Set the input constants from features (N, L, H, C, F) of some decisions."""
        self.scorer.calibrate(features, filled, self.config.inputs)

    def _learn(self, scores: Tensor, utility: Tensor, mask: Tensor) -> dict[str, float]:
        """Learn from the current decision."""
        return self.student.learn(scores, utility, mask, self._observation["positions"])


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]] = {
    "pairwise-weighted": lambda scores, utility, mask, _, margin: pairwise_hinge(scores, utility, mask, margin),
    "pairwise": lambda scores, utility, mask, _, margin: pairwise_hinge(scores, utility, mask, margin, False),
    "regression": lambda scores, utility, mask, _, __: regression(scores, utility, mask),
    "listwise": lambda scores, utility, mask, _, __: listwise(scores, utility, mask),
    "likelihood": lambda scores, utility, mask, positions, _: likelihood(scores, utility, mask, positions),
}
"""Losses by name, as functions of (scores, utility, mask, positions, margin)."""
