"""GRPO on eviction (ForesightKV, arXiv 2602.03203, stage 2): groups of rollouts of one trace, compared with each other.

An update rolls out every trace G times under the sampling policy, all rows as one batch, pays each trajectory by what
it does to the LLM's losses, and normalises within the group. Ratios are formed and clipped per pick, as per token in a
language model's GRPO (arXiv 2402.03300); the loss is the mean over picks, then decisions, then rollouts.

Memory doesn't grow with the number of windows but for the evicted positions and their log-probabilities: a second,
teacher-forced pass replays the evictions, and every decision's features are made, learnt from and forgotten in place.

A trajectory's loss is a joint outcome of thousands of picks. The paper credits all of them alike; what attributes the
loss is attention: a query can only miss pairs that it would have attended to (credit ``attention``). Letting only one
layer of a rollout explore would attribute it, too, but leaves each layer 1/L of the rollouts; where effects add up that
is exactly the variance that the other layers' exploration costs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import agents
from agents.attention_credit import attention_credit
from agents.checkpoint import module_state, optimizer_state, restore_module, restore_optimizer
from agents.episodes import Episodes
from agents.learner import Share, SharedLearner, State, check_numbers, total
from agents.ranking_policy import Evictions, ReplayPolicy, SamplingPolicy
from agents.returns import CREDITS, group_advantages, rollout_metrics, rollout_sums, target_advantages, window_losses
from agents.schedule import warm_cosine
from agents.scorer import Scorer, ScorerPolicy
from kvenv import plackett_luce
from kvenv.features import feature_set
from kvenv.finite import check_finite
from kvenv.registry import REWARDS
from kvenv.rewards import WindowLosses
from kvenv.state import LayerState, Protection
from kvenv.traces import Trace, TraceSource


@dataclass(frozen=True)
class GRPOConfig:
    """Hyper-parameters of GRPO."""

    updates: int = 60
    """Updates; each makes new rollouts."""
    init: str = ""
    """Policy to start from, a name or a directory, e.g. an imitation run's; if empty, random weights."""
    num_traces: int = 4
    """Traces of an update. A mixture's families come in turn: choose a multiple of their number."""
    group: int = 8
    """Rollouts of each trace."""
    at_once: int = 0
    """Traces that are rolled out side by side, 0 for all of an update: the less, the less memory. Gradients add up."""
    epochs: int = 1
    """Gradient steps on the rollouts of an update; beyond the first, ratios differ from 1 and are clipped."""
    budgets: tuple[int, ...] = (64,)
    """Budgets that updates draw from, one each."""
    reward: str = "lm_loss_increase"
    """What a window is paid: foresight, lm_loss, lm_loss_increase, answer_loss or a registered name."""
    credit: Literal["trajectory", "window", "attention"] = "attention"
    """What a pick is credited with: its trajectory's return (the paper), what is paid from its window on, or what is
    paid for the targets whose queries would have attended to what went."""
    temperature: float = 0.3
    """Of the sampled evictions: logits are -score / temperature. It goes with the scale of the scores: 0.3 suits
    imitation's cost, 0.05 its pairwise losses, 0.5 its likelihood, 1 random weights."""
    clip: float = 0.2
    """How far from 1 the ratio of a pick pays."""
    kl: float = 2e-4
    """Weight of the KL divergence from the initial policy, per pick. In the paper's code it is 0.05, but every pick is
    credited with the whole trajectory; credit by attention is shared out and that much smaller."""
    kl_updates: int = 100
    """Updates after which that weight is 0."""
    learning_rate: float = 3e-3
    """Adam's step size after the warm-up (3e-4 in the paper's code)."""
    last_rate: float = 0.1
    """Factor that a cosine lets the step size fall to; 1 keeps it, as in the paper's code."""
    warmup: int = 10
    """Updates of linear warm-up."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    hidden: int = 64
    """Units of a hidden layer of a scorer that starts from random weights."""
    depth: int = 1
    """Hidden layers of such a scorer; one is the paper's, more are normalised."""
    seed: int = 0
    """Seed of traces, budgets, noise and random weights."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            ("temperature", "clip", "learning_rate", "last_rate", "grad_clip"),
            updates=1,
            num_traces=1,
            group=2,
            epochs=1,
            hidden=1,
            depth=1,
            warmup=0,
            at_once=0,
        )
        if not self.budgets:
            raise ValueError("budgets () is impossible: give at least one")
        if self.credit not in CREDITS:
            raise ValueError(f"unknown credit {self.credit!r}: known are {', '.join(CREDITS)}")


PRESETS = {
    "foresightkv": GRPOConfig(
        updates=250,
        num_traces=32,
        group=8,
        epochs=1,
        reward="foresight",
        credit="trajectory",
        temperature=0.05,
        clip=0.2,
        kl=0.05,
        kl_updates=100,
        learning_rate=3e-4,
        last_rate=1.0,
        warmup=10,
        grad_clip=1.0,
        hidden=16,
        depth=1,
    ),
}
"""Published hyper-parameters, from the paper's code where it is public; its group is as large as there were GPUs."""


Advantages = Callable[[int, int], Tensor]
"""Of the picks of a layer and window."""


@dataclass(frozen=True)
class Experience:
    """The rollouts of an update: N rows, those of a trace side by side.

    Attributes
    ----------
    traces : list of Trace
        One per row.
    budget : int
        B.
    evictions : Evictions
        What went.
    windows : WindowLosses
        Of all windows: N * J rows, the J windows of a rollout side by side.
    reward : Tensor (N, J)
        What each window paid.
    seconds : float
        That the policy took.
    """

    traces: list[Trace]
    budget: int
    evictions: Evictions
    windows: WindowLosses
    reward: Tensor
    seconds: float


class GRPOLearner(SharedLearner):
    """Trains a scorer by group-relative policy optimisation.

    Parameters
    ----------
    model : PreTrainedModel
        The LLM, on kvenv's attention (:func:`kvenv.load_model`).
    source : TraceSource
        Training traces; families joined by ``+`` come in turn.
    config : GRPOConfig, optional
        Hyper-parameters.
    interval : int
        W.
    protection : Protection, optional
        Pairs never evicted; if not given, the first 4 and the newest W.
    features : str
        Feature set of a scorer that starts from random weights; one to start from has its own.

    Raises
    ------
    ValueError
        If the reward is unknown, a budget impossible or a trace too short, or the policy to start from is no scorer of
        this model.
    """

    name: ClassVar[str] = "grpo"
    scorer: Scorer

    def __init__(
        self,
        model: PreTrainedModel,
        source: TraceSource,
        config: GRPOConfig | None = None,
        *,
        interval: int = 16,
        protection: Protection | None = None,
        features: str = "pre-rope",
    ) -> None:
        self.config = config or GRPOConfig()
        self.epochs = self.config.epochs
        self.episodes = Episodes(model, source, interval, protection or Protection(recent=interval))
        self.episodes.check(self.config.budgets)
        self._reward = REWARDS.get(self.config.reward)
        start = self._loaded(self.config.init) if self.config.init else self._random(features)
        self.scorer, self.features = start.scorer, feature_set(start.features)
        self.reference = copy.deepcopy(self.scorer).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.scorer.parameters(), lr=self.config.learning_rate)
        self._played: dict[int, tuple[Experience, Advantages, dict[str, float]]] = {}

    @property
    def policy(self) -> ScorerPolicy:
        """The policy as trained so far; it evicts what scores lowest."""
        training = {"learner": self.name, "updates_done": self.done, **asdict(self.config)}
        known = self.episodes.trained_for(self.config.budgets)
        return ScorerPolicy(self.scorer, self.features.name, self.name, training, **known)

    @property
    def parts(self) -> int:
        """How many parts an update has: each rolls out as many traces as may be at once."""
        return -(-self.config.num_traces // (self.config.at_once or self.config.num_traces))

    def share(self, part: int, epoch: int) -> Share:
        """Roll a part's traces out and compare them, in the first epoch; replay them, and return the gradient."""
        began = time.perf_counter()
        if epoch == 0:
            self._played[part] = self._compared(self.collect(part), began)
        experience, advantages, sums = self._played[part]
        began = time.perf_counter()
        self.optimizer.zero_grad()
        learnt = self.accumulate(experience, advantages, self._kl_weight)
        gradients = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.scorer.parameters()
        ]
        sums["time/learn"] += time.perf_counter() - began
        if epoch == self.epochs - 1:
            del self._played[part]
        return Share(gradients, sums | learnt, [trace.name for trace in experience.traces[:: self.config.group]])

    def step(self, shares: Sequence[Share]) -> dict[str, float]:
        """Make a gradient step from the shares of all parts, in order, and return the metrics."""
        config, began = self.config, time.perf_counter()
        rate = warm_cosine(self.done, config.updates, config.warmup, 1 / max(1, config.warmup), config.last_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        for number, weight in enumerate(self.scorer.parameters()):
            weight.grad = torch.stack([share.gradients[number].to(weight.device) for share in shares]).sum(dim=0)
        norm = torch.nn.utils.clip_grad_norm_(self.scorer.parameters(), config.grad_clip)
        self.optimizer.step()
        sums = total(shares)
        sums["time/learn"] += time.perf_counter() - began
        return {
            **rollout_metrics(sums),
            **{tag: value for tag, value in sums.items() if not tag.startswith("sum/")},
            "loss/grad_norm": float(norm),
            "loss/learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def collect(self, part: int) -> Experience:
        """Make the rollouts of a part of the next update.

        Raises
        ------
        ValueError
            If a trace can't be decoded with the budget drawn.
        """
        config, rng = self.config, np.random.default_rng([self.config.seed, self.done])
        budget = int(rng.choice(config.budgets))
        traces = self.episodes.draw(rng, config.num_traces, budget)
        start, size = part * (config.at_once or config.num_traces), config.at_once or config.num_traces
        first = (self.done * config.num_traces + start) * config.group
        return self._play(traces[start : start + size], budget, first)

    def _compared(self, experience: Experience, began: float) -> tuple[Experience, Advantages, dict[str, float]]:
        """Return rollouts that were begun at a time, how they compare, and what is reported of them."""
        collected = time.perf_counter()
        advantages, sums = self.advantages(experience), rollout_sums(experience.windows, experience.reward)
        return (
            experience,
            advantages,
            sums
            | {
                "time/policy": experience.seconds,
                "time/env": collected - began - experience.seconds,
                "time/learn": time.perf_counter() - collected,
            },
        )

    @property
    def _kl_weight(self) -> float:
        """Weight of the divergence from the initial policy in the next update."""
        return self.config.kl if self.done < self.config.kl_updates else 0.0

    def _play(self, traces: Sequence[Trace], budget: int, first: int) -> Experience:
        """Roll traces out, the rollouts numbered from ``first`` on."""
        config, interval = self.config, self.episodes.interval
        rows = [trace for trace in traces for _ in range(config.group)]
        evictions = Evictions(self.episodes.layers, interval)
        sampler = SamplingPolicy(self.policy, config.temperature, evictions)
        done = self.episodes.play(
            sampler,
            rows,
            budget,
            seed=config.seed,
            rollouts=range(first, first + len(rows)),
            on_eviction=sampler.record,
        )
        windows = window_losses(self.episodes.model, traces, done.losses, budget + interval, interval)
        reward = self._reward(windows).unflatten(0, (len(rows), -1))
        check_finite(f"rewards {config.reward!r}", reward, lambda: [trace.name for trace in rows])
        return Experience(rows, budget, evictions, windows, reward, sampler.seconds)

    def advantages(self, experience: Experience) -> Advantages:
        """Return how much better picks did than those of the other rollouts of their trace."""
        config, evictions = self.config, experience.evictions
        if config.credit != "attention":
            by_window = group_advantages(experience.reward, config.group, config.credit)
            return lambda layer, window: by_window[:, window, None, None]
        traces, capacity = experience.traces[:: config.group], experience.budget + self.episodes.interval
        paid = target_advantages(self._reward, experience.windows, len(experience.traces), config.group)
        credit = attention_credit(self.episodes.model, traces, evictions, paid, capacity)
        return lambda layer, window: credit[layer].gather(-1, evictions.positions[layer][window].long().clamp(min=0))

    def accumulate(self, experience: Experience, advantages: Advantages, kl_weight: float) -> dict[str, float]:
        """Add the gradient of some rollouts' share of the loss to the scorer's, one decision at a time; return metrics.

        Parameters
        ----------
        experience : Experience
            The rollouts, which are replayed.
        advantages : callable
            Of the picks of a layer and window: Tensor (N, H, W), or what broadcasts to it.
        kl_weight : float
            Weight of the divergence from the reference.
        """
        evictions, config, interval = experience.evictions, self.config, self.episodes.interval
        rollouts = config.num_traces * config.group
        weight = 1 / (evictions.decisions().clamp(min=1) * rollouts)
        totals: dict[str, Tensor] = {}
        seen = [0] * self.episodes.layers

        def learn(state: LayerState, order: Tensor, count: Tensor) -> None:
            layer, window = state.layer, seen[state.layer]
            seen[layer] += 1
            features = self.features.compute(state)
            picks = (order, state.mask, count, interval)
            share = weight[:, None] / count.clamp(min=1)
            advantage = advantages(layer, window).to(features.dtype)
            with torch.enable_grad():
                logits = -self.scorer(features, layer) / config.temperature
                change = plackett_luce.log_prob(logits, *picks) - evictions.log_prob[layer][window]
                ratio = change.exp()
                clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
                # Where no pick was made the change is 0, but the ratio is 1.
                made = torch.arange(interval, device=order.device) < count[..., None]
                gain = torch.where(made, torch.minimum(ratio * advantage, clipped * advantage), 0.0)
                reference = -self.reference(features, layer) / config.temperature
                kl = plackett_luce.kl(logits, reference, *picks)
                policy_loss, kl_loss = -(gain.sum(dim=-1) * share).sum(), (kl.sum(dim=-1) * share).sum()
                (policy_loss + kl_weight * kl_loss).backward()
            entropy = plackett_luce.entropy(logits.detach(), *picks)
            beyond = ((ratio - 1).abs() > config.clip).to(share.dtype)
            for tag, value in (
                ("loss/policy", policy_loss.detach()),
                ("loss/kl", kl_loss.detach()),
                ("loss/entropy", (entropy.sum(dim=-1) * share).sum()),
                ("loss/clip_fraction", (beyond.sum(dim=-1) * share).sum()),
            ):
                totals[tag] = totals.get(tag, 0) + value

        length = max(len(trace.tokens) for trace in experience.traces)
        replay = ReplayPolicy(evictions, self.features.needs, length)
        self.episodes.play(replay, experience.traces, experience.budget, on_eviction=learn)
        return {tag: float(total) for tag, total in totals.items()}

    def state(self) -> State:
        """Return weights, reference, moments and the count of updates, from which traces and noise follow."""
        tensors = module_state(self.scorer, "scorer") | module_state(self.reference, "reference")
        return State(tensors | optimizer_state(self.optimizer), {"learner": self.name, "done": self.done})

    def restore(self, state: State) -> None:
        """Go on from a state."""
        self.check(state)
        restore_module(self.scorer, state.tensors, "scorer")
        restore_module(self.reference, state.tensors, "reference")
        restore_optimizer(self.optimizer, state.tensors)
        self.done = int(state.values["done"])

    def _loaded(self, init: str) -> ScorerPolicy:
        """Return a copy of the policy to start from."""
        policy = agents.make(init)
        if not isinstance(policy, ScorerPolicy):
            raise ValueError(f"init {init!r} is not a learned policy: give the directory of one with a scorer")
        # What can't be decoded shows now, as random weights let it, not at the update that draws it.
        self.episodes.draw(np.random.default_rng(self.config.seed), 1, max(self.config.budgets))
        model = self.episodes.model
        policy.check_model(model)
        return ScorerPolicy(copy.deepcopy(policy.scorer).to(model.device), policy.features)

    def _random(self, features: str) -> ScorerPolicy:
        """Return a policy of random weights, its input constants taken from a few decisions of its own."""
        config, seen = self.config, feature_set(features)
        scorer, budget = self.episodes.scorer(seen, config.hidden, config.depth, config.seed), max(config.budgets)
        policy = ScorerPolicy(scorer, features)
        traces = self.episodes.draw(np.random.default_rng([config.seed, 2**32]), config.num_traces, budget)
        self.episodes.calibrate([(scorer, seen, "squashed")], policy, traces, budget, config.at_once)
        return policy
