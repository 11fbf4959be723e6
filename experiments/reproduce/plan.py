"""What the claims are measured with: every training and every evaluation as a job, and what they wrote.

One policy per learner and seed, trained on all four families with the budget drawn per episode; one KVP per family and
one on short traces for transfer; everything measured on the same test traces, and on validation traces for choosing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import agents
from agents.grpo import GRPOConfig
from agents.imitation import ImitationConfig
from agents.kvp import KVPConfig
from agents.ppo import PPOConfig
from experiments import evaluate, record
from experiments.jobs import Job
from experiments.learners import GRPO, KVP, PPO, DecodingArgs, Imitation, LearnerArgs, PaidArgs, RolloutArgs, RunArgs
from experiments.reproduce.study import FAMILIES, Contestant, Study, record_store, train_job
from experiments.runs import POLICY, to_json
from kvenv.evaluation import FULL, Row
from kvenv.files import write_atomic

LEARNERS = ("imitation", "grpo", "kvp", "ppo")
EXPECTED = "golden-expected"
SHORT, LONG = 256, 1024
"""Tokens of the traces that one KVP is trained on, and of those it is tested on."""
MIDDLE = 64
"""The budget at which transfer and ppo, which is far behind the other learners, are measured."""


def heuristics() -> list[str]:
    """Return the causal policies that nobody trained."""
    return [name for name in agents.names(trained=False) if not name.startswith("golden")]


def attention_free() -> list[str]:
    """Return the heuristics that see no attention."""
    return [name for name in heuristics() if agents.make(name).needs <= {"noise"}]


@dataclass(frozen=True)
class Size:
    """How much is trained and measured; the defaults are the claims', smaller ones are for trying it out.

    Attributes
    ----------
    seeds : tuple of int
        Of the trainings.
    budgets : tuple of int
        Measured.
    trained_budgets : tuple of int
        Drawn from in training; at larger ones little is lost, and little learnt.
    num_traces : int
        Test traces of each family.
    validation_traces : int
        Validation traces of each family, which choose what stands for the best.
    expected_traces : int
        Test traces of each family on which golden-expected is measured, too.
    long_traces : int
        Test traces of 1,024 tokens of each family, for kvp's transfer to lengths that it was not trained on.
    store_traces : int
        Recorded traces that kvp learns from.
    updates : tuple of int
        Of imitation, grpo, kvp and ppo.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    budgets: tuple[int, ...] = (32, 48, 64, 96)
    trained_budgets: tuple[int, ...] = (32, 48, 64)
    num_traces: int = 200
    validation_traces: int = 16
    expected_traces: int = 12
    long_traces: int = 50
    store_traces: int = 1000
    updates: tuple[int, int, int, int] = (96, 60, 500, 40)


class Plan(Study[Size]):
    """All jobs of the claims, and the rows that they wrote."""

    def jobs(self) -> list[Job]:
        """Return all jobs; what others wait for comes first."""
        size = self.size
        stores = [self._store("all", "+".join(FAMILIES)), *(self._store(family, family) for family in FAMILIES)]
        stores.append(self._store("short", "+".join(FAMILIES), SHORT))
        trained = [self._training(learner, seed) for seed in size.seeds for learner in LEARNERS]
        trained += [self._transfer(family) for family in (*FAMILIES, "short")]
        return [*stores, *trained, *self._initial(), *self._measurements()]

    def rows(self, split: str) -> list[Row]:
        """Return what was measured on a split's traces, of no other seeds than it is about."""
        seeded = (*LEARNERS, "ppo-initial")
        return [row for row in super().rows(split) if row.policy not in seeded or row.seed in self.size.seeds]

    def tokens(self, learner: str) -> int:
        """Return how many tokens an update of grpo or ppo decodes."""
        args = self.arguments(learner, 0)
        rows = args.learner.num_traces * args.learner.group if learner == "grpo" else args.env.num_envs
        return int(rows * args.env.trace_length)

    def arguments(self, learner: str, seed: int) -> LearnerArgs:
        """Return the arguments of a training."""
        size = self.size
        imitation, grpo, kvp, ppo = size.updates
        kept: dict[str, Any] = {"eval_budgets": size.budgets, "out": self.run(f"{learner}-{seed}")}
        if learner == "imitation":
            own = ImitationConfig(updates=imitation, budgets=size.trained_budgets, seed=seed)
            return Imitation(RolloutArgs(), own, RunArgs(eval_every=max(1, imitation // 5), save_every=10, **kept))
        if learner == "grpo":
            start = str(self.run(f"imitation-{seed}") / POLICY)
            config = GRPOConfig(updates=grpo, budgets=size.trained_budgets, init=start, seed=seed)
            return GRPO(RolloutArgs(), config, RunArgs(eval_every=max(1, grpo // 10), save_every=10, **kept))
        if learner == "kvp":
            run = RunArgs(eval_every=max(1, kvp // 4), save_every=100, **kept)
            return KVP(DecodingArgs(), KVPConfig(updates=kvp, seed=seed), run, store=self.out / "stores" / "all")
        learner_ppo = PPOConfig(updates=ppo, budgets=size.trained_budgets, seed=seed)
        run = RunArgs(eval_every=max(1, ppo // 10), save_every=10, **kept)
        return PPO(PaidArgs(budget=max(size.trained_budgets)), learner_ppo, run)

    def terms(self) -> dict[str, Any]:
        """Return the numbers and hyper-parameters that everything is trained and measured with."""
        terms: dict[str, Any] = to_json(self.size)
        for learner in LEARNERS:
            args = self.arguments(learner, 0)
            terms[learner] = {"env": to_json(args.env), "learner": to_json(args.learner)}
            # A path of this directory, which may lie anywhere.
            terms[learner]["learner"].pop("init", None)
        return terms

    def _store(self, name: str, traces: str, length: int = 512) -> Job:
        count = self.size.store_traces if name in ("all", "short") else self.size.store_traces // 2
        args = record.Args(out=self.out / "stores" / name, traces=traces, num_traces=count, trace_length=length)
        return self.job(f"store-{name}", record_store, args)

    def _training(self, learner: str, seed: int) -> Job:
        after = {"grpo": (f"imitation-{seed}",), "kvp": ("store-all",)}.get(learner, ())
        return self.job(f"{learner}-{seed}", train_job, self.arguments(learner, seed), after=after)

    def _transfer(self, name: str) -> Job:
        """Return the training, half as long, of a KVP that sees one family only, or short traces only."""
        args: Any = self.arguments("kvp", self.size.seeds[0])
        run = replace(args.run, out=self.run(f"kvp-{name}"), eval_every=0)
        fewer = replace(args.learner, updates=max(1, args.learner.updates // 2))
        args = replace(args, store=self.out / "stores" / name, run=run, learner=fewer)
        return self.job(f"kvp-{name}", train_job, args, after=(f"store-{name}",))

    def _initial(self) -> list[Job]:
        """Return the jobs that save what PPO starts from."""
        return [
            self.job(f"ppo-initial-{seed}", save_initial, self.arguments("ppo", seed), self.run(f"ppo-initial-{seed}"))
            for seed in self.size.seeds
        ]

    def _measurements(self) -> list[Job]:
        size = self.size
        test = evaluate.Args(budgets=size.budgets, traces=FAMILIES, num_traces=size.num_traces, batch_size=32)
        validation = replace(test, split="validation", num_traces=size.validation_traces)
        expected = replace(test, num_traces=size.expected_traces, batch_size=8)
        largest = max(size.budgets)
        middle = replace(test, budgets=(MIDDLE,), score_from=largest + test.interval)
        far = replace(middle, trace_length=LONG, num_traces=size.long_traces)
        trained = {
            learner: [self.trained(learner, f"{learner}-{seed}", seed) for seed in size.seeds] for learner in LEARNERS
        }
        initial = [
            Contestant("ppo-initial", str(self.run(f"ppo-initial-{seed}")), seed, (f"ppo-initial-{seed}",))
            for seed in size.seeds
        ]
        transferred = {name: self.trained(f"kvp-{name}", f"kvp-{name}") for name in (*FAMILIES, "short")}
        untrained = [Contestant(name, name) for name in (*heuristics(), "golden", FULL)]
        learned = [one for learner in LEARNERS if learner != "ppo" for one in trained[learner]]
        free = [one for one in untrained if one.name in (*attention_free(), "golden", FULL)]
        return [
            *self.measurement("test", expected, [Contestant(EXPECTED, EXPECTED)]),
            *self.measurement("validation", validation, [*learned, *untrained]),
            *self.measurement("test", test, [*learned, *untrained]),
            *self.measurement("test", middle, [*trained["ppo"], *initial, *transferred.values()]),
            *self.measurement("long", far, [trained["kvp"][0], transferred["short"], *free]),
        ]


def save_initial(args: LearnerArgs, directory: Path, result: Path) -> None:
    """Save the policy that a training starts from."""
    policy: Any = args.build().policy
    policy.save_pretrained(directory)
    write_atomic(result, "")
