"""PPO by Stable-Baselines3, unmodified, on one decision of a (layer, KV head) per row (arXiv 1707.06347).

For SB3 as its users know it, take :class:`agents.KVRankingPolicy` and :func:`agents.make_sb3_env`. The learner here is
the same model as ``kvenv train`` runs it: same tags as the other learners, and checkpoints without pickles.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import cast

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize
from torch import Tensor

import agents
from agents.base import Policy
from agents.checkpoint import optimizer_state, restore_optimizer
from agents.episodes import CALIBRATED_ON
from agents.learner import Learner, State, check_numbers
from agents.sb3_env import HeadVecEnv, Observation
from agents.sb3_policy import KVRankingPolicy
from agents.scorer import ScorerPolicy
from kvenv.head_view import HeadView
from kvenv.identity import ModelIdentity
from kvenv.memory import side_by_side
from kvenv.vector_env import KVEvictVectorEnv


@dataclass(frozen=True)
class PPOConfig:
    """Hyper-parameters of PPO."""

    updates: int = 200
    """Updates; each plays one episode of every trace beside the others and learns from it."""
    init: str = ""
    """Policy to start from, a name or a directory, e.g. an imitation run's; if empty, random weights."""
    temperature: float = 1.0
    """What the scores of that policy are divided by."""
    epochs: int = 4
    """Passes over an update's decisions."""
    minibatches: int = 8
    """Gradient steps of a pass, or fewer: they share its decisions evenly."""
    learning_rate: float = 1e-3
    """Adam's step size."""
    discount: float = 0.95
    """Gamma: what a reward one window later is worth."""
    gae_lambda: float = 0.95
    """Bias against variance of the advantages (arXiv 1506.02438); 1 takes returns as they are."""
    clip: float = 0.2
    """How far from 1 the ratio of a decision's probabilities pays."""
    entropy: float = 0.0
    """Weight of the entropy bonus, per decision."""
    value: float = 0.5
    """Weight of the critic's squared error."""
    grad_clip: float = 0.5
    """Largest norm of the gradient of actor and critic together."""
    target_kl: float = 0.0
    """Estimated KL divergence that ends an update's passes early; 0 never does."""
    budgets: tuple[int, ...] = ()
    """Budgets that episodes are drawn from, none above the environment's; its own alone if empty."""
    hidden: int = 64
    """Hidden units of the scorer and of the critic."""
    seed: int = 0
    """Seed of weights, traces, budgets, sampled evictions and mini-batches."""

    def __post_init__(self) -> None:
        check_numbers(
            self, ("temperature", "learning_rate", "clip", "grad_clip"), updates=1, epochs=1, minibatches=1, hidden=1
        )
        for name in ("discount", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is impossible: it must be between 0 and 1")


class PPOLearner(Learner):
    """Trains by Stable-Baselines3's PPO: an update is one ``model.learn`` of one rollout.

    Every update begins new episodes, and everything about it follows from the seed and its number: a checkpoint between
    updates holds weights, moments and the scale of the rewards, and nothing of the environment.

    Parameters
    ----------
    env : KVEvictVectorEnv
        With ``output="numpy"`` and ``autoreset_mode="SameStep"``. SB3 keeps an update's observations in memory.
    config : PPOConfig, optional
        Hyper-parameters.

    Attributes
    ----------
    model : PPO
        SB3's.

    Raises
    ------
    ValueError
        If the environment is set up otherwise, or the policy to start from doesn't fit.
    """

    name = "ppo"

    def __init__(self, env: KVEvictVectorEnv, config: PPOConfig | None = None) -> None:
        self.env, self.config, self.done = env, config or PPOConfig(), 0
        self._check()
        config, limits = self.config, env.dynamics.limits
        shortest = min(config.budgets, default=limits.budget) + limits.interval
        decisions = -(-(limits.trace_length - 1 - shortest) // limits.interval) if limits.periodic else 1
        self.rows = HeadVecEnv(HeadView(env))
        total = decisions * self.rows.num_envs
        # Returns of hundreds of nats would drown the actor's gradient in the critic's: both are clipped as one.
        self.venv = VecNormalize(VecMonitor(self.rows), norm_obs=False, gamma=config.discount)
        with self._seeded():
            self.model = PPO(
                KVRankingPolicy,
                self.venv,
                learning_rate=config.learning_rate,
                n_steps=decisions,
                batch_size=total // next(m for m in range(config.minibatches, 0, -1) if total % m == 0),
                n_epochs=config.epochs,
                gamma=config.discount,
                gae_lambda=config.gae_lambda,
                clip_range=config.clip,
                ent_coef=config.entropy,
                vf_coef=config.value,
                max_grad_norm=config.grad_clip,
                target_kl=config.target_kl or None,
                stats_window_size=self.rows.num_envs,
                policy_kwargs={"hidden": config.hidden},
                device=env.dynamics.model.device,
            )
            self.model.set_logger(Logger(None, []))
            self._norms = GradientNorms(self.model.policy)
            self._calibrate(decisions)
        if config.init:
            self._take_over(agents.make(config.init))

    @property
    def policy(self) -> ScorerPolicy:
        """The policy as trained so far."""
        training = {"learner": self.name, "updates_done": self.done, **asdict(self.config)}
        model, limits = ModelIdentity.of(self.env.dynamics.model), self.env.dynamics.limits
        budgets = self.config.budgets or (limits.budget,)
        about = {"training": training, "model": model, "budgets": budgets, "interval": limits.interval}
        return self._actor.ranking_policy(self.env.features, self.name, **about)

    def update(self) -> dict[str, float]:
        """Play as many decisions as the smallest budget's episodes have, learn from them, and return the metrics.

        Rows of larger budgets are at their end sooner and begin another episode, at the environment's budget.
        """
        began, in_env, stopwatch = time.perf_counter(), self.rows.seconds, Stopwatch(self.env)
        with self._seeded():
            self._begin()
            # One rollout, fewer than log_interval: nothing is written, and what SB3 logged can be read.
            with side_by_side(self.env.num_envs, self.env.dynamics.limits.trace_length):
                self.model.learn(self.model.n_steps * self.model.n_envs, stopwatch, log_interval=2)
        self.done += 1
        self.learnt_from = [self.env.dynamics.source[int(trace)].name for trace in stopwatch.traces]
        ended, in_env = time.perf_counter(), self.rows.seconds - in_env
        logged, buffer = self.model.logger.name_to_value, self.model.rollout_buffer
        return {
            "rollout/ep_rew_mean": float(np.mean([episode["r"] for episode in self.model.ep_info_buffer or ()])),
            "loss/ppo": float(logged["train/policy_gradient_loss"]),
            "loss/value": float(logged["train/value_loss"]),
            "loss/kl": float(logged["train/approx_kl"]),
            "loss/entropy": -float(logged["train/entropy_loss"]) / float(buffer.observations["count"].mean()),
            "loss/clip_fraction": float(logged["train/clip_fraction"]),
            # NaN where all returns are alike: nothing is to be explained.
            "loss/explained_variance": float(np.nan_to_num(logged["train/explained_variance"])),
            "loss/grad_norm": self._norms.mean(),
            "time/env": in_env,
            "time/policy": stopwatch.collected - began - in_env,
            "time/learn": ended - stopwatch.collected,
        }

    def state(self) -> State:
        """Return weights, moments and the scale of the rewards."""
        policy, scale = self.model.policy, self.venv.ret_rms
        tensors = {f"policy.{name}": tensor.detach().clone() for name, tensor in policy.state_dict().items()}
        rewards = {name: float(getattr(scale, name)) for name in ("mean", "var", "count")}
        values = {"learner": self.name, "done": self.done, "rewards": rewards}
        return State(tensors | optimizer_state(policy.optimizer), values)

    def restore(self, state: State) -> None:
        """Go on from a state.

        Raises
        ------
        ValueError
            If the state is of another learner or other shapes.
        """
        self.check(state)
        prefix = "policy."
        weights = {key.removeprefix(prefix): x for key, x in state.tensors.items() if key.startswith(prefix)}
        try:
            self.model.policy.load_state_dict(weights)
            rewards = {name: np.float64(state.values["rewards"][name]) for name in ("mean", "var", "count")}
            self.done = int(state.values["done"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the state doesn't fit this policy: {error}") from error
        vars(self.venv.ret_rms).update(rewards)
        self.model.policy.optimizer.state.clear()
        restore_optimizer(self.model.policy.optimizer, state.tensors)

    @property
    def _actor(self) -> KVRankingPolicy:
        """The model's policy."""
        return cast(KVRankingPolicy, self.model.policy)

    def _check(self) -> None:
        """Refuse what can't work."""
        env, most = self.env, self.env.dynamics.limits.budget
        if env.output != "numpy" or env.autoreset_mode != "SameStep":
            raise ValueError(
                "ppo needs an environment with output='numpy' and autoreset_mode='SameStep', "
                f"not {env.output!r} and {env.autoreset_mode!r}"
            )
        if max(self.config.budgets, default=most) > most:
            raise ValueError(f"budgets {self.config.budgets} exceed the environment's budget {most}: raise --budget")

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Let the global generators, SB3's only ones, follow from the seed and the number of the update."""
        numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        self._rng = np.random.default_rng([self.config.seed, self.done])
        np.random.seed(int(self._rng.integers(2**31)))  # noqa: NPY002
        torch.manual_seed(int(self._rng.integers(2**31)))
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            torch.set_rng_state(torch_state)

    def _begin(self) -> None:
        """Draw what the next reset begins."""
        self.venv.seed(int(self._rng.integers(2**31)))
        budgets = self._rng.choice(self.config.budgets or (self.env.dynamics.limits.budget,), size=self.env.num_envs)
        self.venv.set_options([{"budget": int(budget)} for budget in budgets.repeat(self.rows.copies)])

    def _calibrate(self, decisions: int) -> None:
        """Take the scorer's input constants from random evictions, of decisions all along the episodes."""
        self._begin()
        seen = [self.rows.reset()]
        for _ in range(decisions - 1):
            observation, *_ = self.rows.step(self._rng.uniform(-1, 1, self.rows.env.action_space.shape))
            seen.append(cast(Observation, observation))
        taken = [seen[i] for i in np.unique(np.linspace(0, decisions - 1, CALIBRATED_ON).astype(int))]
        self._actor.calibrate({name: np.concatenate([x[name] for x in taken]) for name in taken[0]})

    def _take_over(self, policy: Policy) -> None:
        """Start from a policy."""
        if not isinstance(policy, ScorerPolicy) or policy.features != self.env.features:
            raise ValueError(
                f"init {self.config.init!r} can't be gone on from: it takes a scorer over features "
                f"{self.env.features!r}, this is {policy.name!r} over {getattr(policy, 'features', 'no features')!r}"
            )
        policy.check_model(self.env.dynamics.model)
        self._actor.start_from(policy, self.config.temperature)


class Stopwatch(BaseCallback):
    """Says when SB3 had collected a rollout, and with which traces it began."""

    collected = 0.0

    def __init__(self, env: KVEvictVectorEnv) -> None:
        super().__init__()
        self.env, self.traces = env, np.zeros(0, np.int64)

    def _on_rollout_start(self) -> None:
        self.traces = self.env.dynamics.counters.trace.copy()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.collected = time.perf_counter()


class GradientNorms:
    """Norms of a module's gradients before SB3 clips them, which it doesn't tell.

    Parameters
    ----------
    policy : ActorCriticPolicy
        With its optimizer.
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self._squares: list[Tensor] = []
        self._norms: list[Tensor] = []
        for parameter in policy.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: self._squares.append(p.grad.square().sum()))
        policy.optimizer.register_step_pre_hook(lambda *_: self._close())

    def mean(self) -> float:
        """Return the mean norm since the last call."""
        norms, self._norms = self._norms, []
        return float(torch.stack(norms).mean()) if norms else 0.0

    def _close(self) -> None:
        """Make a norm of the squares since the last gradient step."""
        self._norms.append(torch.stack(self._squares).sum().sqrt())
        self._squares.clear()
