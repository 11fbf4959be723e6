"""What is trained and measured beside ForesightKV's figures (arXiv 2602.03203)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import agents
from agents.base import Policy
from agents.grpo import GRPOConfig
from agents.imitation import ImitationConfig
from agents.ranking_policy import SamplingPolicy
from agents.scorer import ScorerPolicy
from experiments import evaluate
from experiments.jobs import Job
from experiments.learners import GRPO, Imitation, LearnerArgs, RolloutArgs, RunArgs
from experiments.reproduce.study import FAMILIES, Contestant, Study, train_job
from experiments.runs import POLICY, to_json
from kvenv.decode import full_cache_losses
from kvenv.features import register_features
from kvenv.files import read_json, write_atomic
from kvenv.models import load_model
from kvenv.rewards import SPIKE, WindowLosses, low_entropy, register_reward
from kvenv.state import LayerState
from kvenv.traces import load_traces

START = "imitation-tiny"
"""The supervised policy that the rewards improve on and the samplers draw from."""
NEVER = 1e6
"""Score of a pair outside the pool that evictions are drawn from."""


def low_entropy_loss(losses: WindowLosses) -> Tensor:
    """-(sum of the NLL of the window's low-entropy targets) / W."""
    return -(losses.nll * losses.full.low_entropy).sum(dim=1) / losses.interval


def high_entropy_loss(losses: WindowLosses) -> Tensor:
    """-(sum of the NLL of all other targets of the window) / W."""
    return -(losses.nll * ~losses.full.low_entropy).sum(dim=1) / losses.interval


def low_entropy_spikes(losses: WindowLosses) -> Tensor:
    """-(sum of the loss increases beyond 1.5 nats of low-entropy targets) / W: the paper's, not squared."""
    large = losses.full.low_entropy & (losses.increase > SPIKE)
    return -torch.where(large, losses.increase, 0.0).sum(dim=1) / losses.interval


def attention_only(state: LayerState) -> Tensor:
    """Eight attention statistics per query head: the paper's view of a pair without key and value; F = 8G."""
    if state.stats is None:
        raise ValueError("the features read state.stats, which is None: name 'stats' in needs")
    return state.stats.transpose(2, 3).flatten(3)


# Jobs run in processes of their own: what is registered here is known to jobs that call a function of this module.
for _reward in (low_entropy_loss, high_entropy_loss, low_entropy_spikes):
    register_reward(_reward.__name__, _reward)
register_features("attention-only", attention_only, lambda _, groups: 8 * groups, frozenset({"stats"}))

REWARDS = {
    "all": "lm_loss_increase",
    "low": low_entropy_loss.__name__,
    "high": high_entropy_loss.__name__,
    "large": low_entropy_spikes.__name__,
    "squared": "foresight",
}
"""The rewards of the paper's ablation."""
FEATURES = ("foresight", "attention-only", "kv")
"""What the scorers of the feature ablation see; the first is the paper's."""
RIVALS = ("golden", "h2o", "snapkv", "r-kv", "random", START)
"""Whose losses are compared with the full cache's; the first four are the paper's."""
SAMPLERS = tuple(f"{pool}-{temperature}" for temperature in (GRPOConfig.temperature, 10.0) for pool in ("all", "pool"))
"""Where evictions are drawn from, and how hot: at GRPO's temperature hardly anything but the lowest W goes."""


class Pooled(ScorerPolicy):
    """Evicts from the 2 W candidates that score lowest only."""

    def __call__(self, state: LayerState) -> Tensor:
        """Return the scores (N, H, C), those outside the pool so high that no noise reaches them."""
        scores = super().__call__(state)
        lowest = scores.masked_fill(~state.mask, torch.inf)
        pool = lowest.topk(min(2 * state.interval, scores.shape[-1]), largest=False).indices
        return torch.full_like(scores, NEVER).scatter(-1, pool, scores.gather(-1, pool))


def sampler(name: str) -> Policy:
    """Return the supervised policy with evictions drawn as one of the samplers says."""
    pool, temperature = name.split("-")
    start: Any = agents.make(START)
    if pool == "pool":
        start = Pooled(start.scorer, start.features, start.name)
    return SamplingPolicy(start, float(temperature))


@dataclass(frozen=True)
class Size:
    """How much is trained and measured; the defaults are the committed page's, smaller ones are for trying it out.

    Attributes
    ----------
    budgets : tuple of int
        At which losses are compared with the full cache's: with windows of 16 tokens the paper's B / W.
    oracle_traces : int
        Test traces of each family for that.
    budget : int
        At which the ablations are trained and measured.
    num_traces : int
        Test traces of each family for the ablations.
    updates : tuple of int
        Of a reward's training and of a feature set's.
    batch : tuple of int
        Training traces of an update of each; every one is rolled out 8 times for a reward.
    noise_seeds : tuple of int
        Of the samplers.
    """

    budgets: tuple[int, ...] = (64, 128)
    oracle_traces: int = 64
    budget: int = 48
    num_traces: int = 64
    updates: tuple[int, int] = (20, 24)
    batch: tuple[int, int] = (4, 16)
    noise_seeds: tuple[int, ...] = (0,)


class ForesightStudy(Study[Size]):
    """All jobs, and what they wrote."""

    def jobs(self) -> list[Job]:
        """Return all jobs."""
        size = self.size
        trained = [f"reward-{name}" for name in REWARDS] + [f"features-{name}" for name in FEATURES]
        test = evaluate.Args(traces=FAMILIES, num_traces=size.num_traces, budgets=(size.budget,), batch_size=32)
        oracle = replace(test, num_traces=size.oracle_traces, budgets=size.budgets)
        learned = [self._contestant(name) for name in trained]
        samplers = [Contestant(name, partial(sampler, name), seed) for name in SAMPLERS for seed in size.noise_seeds]
        return [
            *(self.job(name, train_here, self.arguments(name)) for name in trained),
            self.job("full", full_losses, oracle, self.out / "full.json"),
            *self.measurement("oracle", oracle, [Contestant(name, name) for name in RIVALS]),
            *self.measurement("test", test, [*(Contestant(name, name) for name in (START, "random")), *learned]),
            *(job for one in samplers for job in self.measurement("test", replace(test, seeds=(one.seed,)), [one])),
        ]

    def arguments(self, name: str) -> LearnerArgs:
        """Return the arguments of a training, ``reward-...`` or ``features-...``."""
        size, (kind, what) = self.size, name.split("-", 1)
        run = RunArgs(eval_every=0, save_every=10, out=self.run(name))
        (rl_updates, sl_updates), (rl_batch, sl_batch), budgets = size.updates, size.batch, (size.budget,)
        if kind == "reward":
            terms: dict[str, Any] = {"reward": REWARDS[what], "init": START, "num_traces": rl_batch, "budgets": budgets}
            return GRPO(RolloutArgs(), GRPOConfig(updates=rl_updates, **terms), run)
        own = ImitationConfig(updates=sl_updates, num_traces=sl_batch, budgets=budgets)
        return Imitation(RolloutArgs(features=what), own, run)

    def terms(self) -> dict[str, Any]:
        """Return the numbers and hyper-parameters that everything is trained and measured with."""
        names = ("reward-all", f"features-{FEATURES[0]}")
        return to_json(self.size) | {name: to_json(self.arguments(name).learner) for name in names}

    def full(self) -> dict[str, list[list[float]]]:
        """Return the full cache's mean losses of low- and high-entropy targets, by family, trace by trace."""
        return dict(read_json(self.out / "full.json", "the full cache's losses"))

    def _contestant(self, name: str) -> Contestant:
        return Contestant(name, partial(load_here, str(self.run(name) / POLICY)), after=(name,))


def train_here(args: LearnerArgs, result: Path) -> None:
    """Train with what this module registers."""
    train_job(args, result)


def load_here(directory: str) -> Policy:
    """Return a policy that may see what this module registers."""
    return agents.make(directory)


def full_losses(args: evaluate.Args, path: Path, result: Path) -> None:
    """Write the full cache's mean losses of each trace's low-entropy targets and of its others."""
    loaded, score_from = load_model(args.model), max(args.budgets) + args.interval
    found: dict[str, list[list[float]]] = {}
    for family in args.traces:
        source = load_traces(family, split=args.split, tokenizer=loaded.tokenizer, trace_length=args.trace_length)
        found[family] = []
        for start in range(0, args.num_traces, args.batch_size):
            ids = range(start, min(start + args.batch_size, args.num_traces))
            tokens = [source[i].tokens for i in ids]
            losses = full_cache_losses(loaded.model, tokens)
            for row, trace in enumerate(tokens):
                nll, entropy = (x[row, score_from : len(trace) - 1] for x in (losses.nll, losses.entropy))
                low = low_entropy(entropy)
                found[family].append([float(nll[low].double().mean()), float(nll[~low].double().mean())])
    write_atomic(path, json.dumps(found) + "\n")
    write_atomic(result, "")
