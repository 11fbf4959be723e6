"""Imitation of Golden Eviction: rank cached pairs as the expert does (ForesightKV, arXiv 2602.03203, stage 1; DAgger).

An update leads some traces through the cache, layer by layer: at every decision golden labels the pairs, the layer's
scorers take a gradient step, and golden, or with DAgger the scorer itself, evicts. Layers share no weights, so each has
an optimizer of its own, and nothing is kept of a decision that was learnt from.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from agents.base import Policy, needed
from agents.checkpoint import module_state, optimizer_state, restore_module, restore_optimizer
from agents.episodes import Episodes
from agents.learner import Learner, State, check_numbers
from agents.ranking_losses import LOSSES, LossName
from agents.returns import rollout_metrics, rollout_sums, window_losses
from agents.schedule import follow, warm_cosine
from agents.scorer import Inputs, Scorer, ScorerPolicy
from kvenv.features import FeatureSet, feature_set
from kvenv.registry import REWARDS
from kvenv.state import LayerState, Protection
from kvenv.traces import TraceSource


@dataclass(frozen=True)
class ImitationConfig:
    """Hyper-parameters of imitation."""

    updates: int = 96
    """Updates; each leads its traces from the first decision to the last and takes a gradient step at every one."""
    num_traces: int = 16
    """Traces of an update. A mixture's families come in turn: choose a multiple of their number."""
    loss: LossName = "team-cost"
    """How golden's order is learnt: the cost over all budgets of rankings drawn by the scores (KVP's reward in closed
    form), of a layer's heads together, which stand in for each other, or of each head alone; a hinge on pairs,
    weighted by how much their order matters or all alike (ForesightKV's paper), regression on the logarithm of the
    utility, shares of utility as a distribution (ListNet), or the likelihood of golden's order under the Plackett-Luce
    model (ListMLE)."""
    learning_rate: float = 6e-3
    """Adam's step size after the warm-up; falls to a twentieth by a cosine."""
    warmup: int = 5
    """Updates of linear warm-up."""
    power: float = 3.0
    """Power that golden's utilities are taken to first. Golden knows whether a pair will be needed; who can only expect
    it must not prefer what is always seen a bit to what may once be all that counts."""
    margin: float = 0.1
    """How much higher the better of two pairs must score in the pairwise losses (0.01 in the paper's code)."""
    hidden: int = 64
    """Units of a hidden layer of the scorer (16 in the paper's code)."""
    depth: int = 1
    """Hidden layers of the scorer; one is the paper's, more are normalised."""
    inputs: Inputs = "squashed"
    """How the scorer takes features in: squashed by the inverse hyperbolic sine and standardised, standardised only, or
    raw; compared in experiments/results."""
    ema: float = 0.99
    """Decay of the running mean of the weights, which is the policy: single traces pull the weights about."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    budgets: tuple[int, ...] = (64,)
    """Budgets that updates draw from, one each."""
    dagger: float = 0.5
    """Share of traces in which the scorer evicts (DAgger); golden does in the others. Labels are always golden's."""
    dagger_ramp: int = 5
    """Updates over which that share rises from 0."""
    seed: int = 0
    """Seed of the initial weights, traces and budgets."""

    def __post_init__(self) -> None:
        check_numbers(self, ("learning_rate", "power", "grad_clip"), num_traces=1, hidden=1, depth=1, warmup=0)
        for name in ("dagger", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is no share: choose 0 to 1")
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}: known are {', '.join(LOSSES)}")
        if not self.budgets:
            raise ValueError("budgets () is impossible: give at least one")


PRESETS = {
    "foresightkv": ImitationConfig(
        updates=1000,
        num_traces=4,
        loss="pairwise",
        power=1.0,
        learning_rate=1e-2,
        margin=0.01,
        warmup=10,
        ema=0.0,
        hidden=16,
        depth=1,
        dagger=0.0,
    ),
}
"""Published hyper-parameters, from the papers' code where it is public."""


class Student:
    """A scorer that learns golden's order from decisions it is shown, each layer at its own pace.

    Parameters
    ----------
    scorer : Scorer
        What learns.
    features : FeatureSet
        What it sees.
    config : ImitationConfig
        Hyper-parameters.
    """

    def __init__(self, scorer: Scorer, features: FeatureSet, config: ImitationConfig) -> None:
        self.scorer, self.features, self.config = scorer, features, config
        self.mean = copy.deepcopy(scorer)
        self.layers, self._means = ([x.part(layer) for layer in range(x.shape[0])] for x in (scorer, self.mean))
        self.steps = [0] * len(self.layers)
        self.optimizers = [torch.optim.Adam(part.parameters(), lr=config.learning_rate) for part in self.layers]

    def score(self, state: LayerState) -> Tensor:
        """Return the scores (N, H, C) of a decision of one layer, which :meth:`learn` takes with their history."""
        features = self.features.compute(state)
        with torch.enable_grad():
            return self.layers[state.layer](features, 0)

    def learn(self, scores: Tensor, state: LayerState, rate: float) -> tuple[Tensor, Tensor]:
        """Take a gradient step on a decision of one layer.

        Parameters
        ----------
        scores : Tensor (N, H, C)
            What :meth:`score` returned.
        state : LayerState
            With ``future``.
        rate : float
            Step size.

        Returns
        -------
        Tensor (), Tensor ()
            The loss, and the norm of the gradient.
        """
        config, part, optimizer = self.config, self.layers[state.layer], self.optimizers[state.layer]
        with torch.enable_grad():
            utility = needed(state, "future") ** config.power
            # A row whose trace has ended has no future, and nothing to teach.
            mask = state.mask & (utility > 0).any(dim=-1, keepdim=True)
            loss = LOSSES[config.loss](scores, utility, mask, state.positions, config.margin)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(part.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        self.steps[state.layer] += 1
        follow(self._means[state.layer], part, self.steps[state.layer], config.ema)
        return loss.detach(), norm


class Lesson(Policy):
    """Leads episodes: golden's ranking or the first student's, row by row; all students learn.

    Parameters
    ----------
    students : sequence of Student
        Who learns.
    led : Tensor (N,) bool
        Rows in which the first student decides.
    rate : float
        Factor on the students' step size.

    Attributes
    ----------
    deciding, learning : float
        Seconds that scoring and gradient steps took so far.
    """

    name = "lesson"

    def __init__(self, students: Sequence[Student], led: Tensor, rate: float) -> None:
        self.students, self.led, self.rate = students, led, rate
        self.deciding = self.learning = 0.0
        self.needs = frozenset({"future"}).union(*(student.features.needs for student in students))
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        began = time.perf_counter()
        scores = [student.score(state) for student in self.students]
        scored = time.perf_counter()
        learnt = [
            student.learn(own, state, self.rate * student.config.learning_rate)
            for student, own in zip(self.students, scores)
        ]
        for values, value in zip((self._losses, self._norms), learnt[0]):
            values.append(value)
        self.deciding += scored - began
        self.learning += time.perf_counter() - scored
        future = needed(state, "future")
        return torch.where(self.led[:, None, None], scores[0].detach().to(future.dtype), future)

    def metrics(self) -> dict[str, float]:
        """Return the means of the first student's losses and gradient norms over all decisions so far."""
        return {
            "loss/ranking": float(torch.stack(self._losses).mean()),
            "loss/grad_norm": float(torch.stack(self._norms).mean()),
        }


class ImitationLearner(Learner):
    """Trains a scorer to rank cached pairs as Golden Eviction does.

    Everything about an update follows from the seed and its number: a checkpoint holds weights and moments only.

    Parameters
    ----------
    model : PreTrainedModel
        The LLM, on kvenv's attention (:func:`kvenv.load_model`).
    source : TraceSource
        Training traces; families joined by ``+`` come in turn.
    config : ImitationConfig, optional
        Hyper-parameters.
    interval : int
        W.
    protection : Protection, optional
        Pairs never evicted; if not given, the first 4 and the newest W.
    features : str
        Feature set that the scorer sees.

    Raises
    ------
    ValueError
        If a budget is impossible, or a trace too short.
    """

    name = "imitation"

    def __init__(
        self,
        model: PreTrainedModel,
        source: TraceSource,
        config: ImitationConfig | None = None,
        *,
        interval: int = 16,
        protection: Protection | None = None,
        features: str = "pre-rope",
    ) -> None:
        self.config, self.done = config or ImitationConfig(), 0
        self.episodes = Episodes(model, source, interval, protection or Protection(recent=interval))
        self.episodes.check(self.config.budgets)
        self.students = self._enrol(feature_set(features))
        rng, budget = np.random.default_rng([self.config.seed, 2**32]), max(self.config.budgets)
        traces = self.episodes.draw(rng, self.config.num_traces, budget)
        self.episodes.calibrate(
            [(student.scorer, student.features, student.config.inputs) for student in self.students],
            _Shown([student.features for student in self.students]),
            traces,
            budget,
            future=self.episodes.future(traces, budget),
        )
        for student in self.students:
            student.mean.load_state_dict(student.scorer.state_dict())

    @property
    def policy(self) -> ScorerPolicy:
        """The policy as trained so far."""
        student, training = self.students[0], {"learner": self.name, "updates_done": self.done, **asdict(self.config)}
        known = self.episodes.trained_for(self.config.budgets)
        return ScorerPolicy(student.mean, student.features.name, self.name, training, **known)

    def update(self) -> dict[str, float]:
        """Lead some traces from the first decision to the last, learn from each, and return the metrics."""
        began, config = time.perf_counter(), self.config
        rng = np.random.default_rng([config.seed, self.done])
        budget = int(rng.choice(config.budgets))
        traces = self.episodes.draw(rng, config.num_traces, budget)
        self.learnt_from = [trace.name for trace in traces]
        share = config.dagger * min(1.0, self.done / max(1, config.dagger_ramp))
        led = torch.as_tensor(rng.random(len(traces)) < share, device=self.episodes.model.device)
        rate = warm_cosine(self.done, config.updates, config.warmup, 0.2, 0.05)
        lesson = Lesson(self.students, led, rate)
        rollout = self.episodes.play(lesson, traces, budget, future=self.episodes.future(traces, budget))
        interval = self.episodes.interval
        windows = window_losses(self.episodes.model, traces, rollout.losses, budget + interval, interval)
        self.done += 1
        reward = REWARDS.get("lm_loss_increase")(windows).unflatten(0, (len(traces), -1))
        return {
            **rollout_metrics(rollout_sums(windows, reward)),
            **lesson.metrics(),
            "loss/learning_rate": lesson.rate * config.learning_rate,
            "time/policy": lesson.deciding,
            "time/learn": lesson.learning,
            "time/env": time.perf_counter() - began - lesson.deciding - lesson.learning,
        }

    def state(self) -> State:
        """Return weights and moments; traces, budgets and leaders follow from the count of updates."""
        student = self.students[0]
        tensors = module_state(student.scorer, "scorer") | module_state(student.mean, "mean")
        for layer, optimizer in enumerate(student.optimizers):
            tensors |= optimizer_state(optimizer, f"optimizer.{layer}")
        return State(tensors, {"learner": self.name, "done": self.done, "steps": list(student.steps)})

    def restore(self, state: State) -> None:
        """Go on from a state.

        Raises
        ------
        ValueError
            If the state is of another learner or other shapes.
        """
        self.check(state)
        student = self.students[0]
        restore_module(student.scorer, state.tensors, "scorer")
        restore_module(student.mean, state.tensors, "mean")
        self.done, student.steps = int(state.values["done"]), [int(steps) for steps in state.values["steps"]]
        for layer, optimizer in enumerate(student.optimizers):
            optimizer.state.clear()
            restore_optimizer(optimizer, state.tensors, f"optimizer.{layer}")

    def _enrol(self, features: FeatureSet) -> list[Student]:
        """Return who learns; the first one is the policy."""
        config = self.config
        return [Student(self.episodes.scorer(features, config.hidden, config.depth, config.seed), features, config)]


class _Shown(Policy):
    """Golden, while feature sets look on."""

    name = "shown"

    def __init__(self, features: Sequence[FeatureSet]) -> None:
        self.needs = frozenset({"future"}).union(*(of.needs for of in features))

    def __call__(self, state: LayerState) -> Tensor:
        """Return golden's utilities."""
        return needed(state, "future")
