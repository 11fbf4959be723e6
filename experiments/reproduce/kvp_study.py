"""What is trained and measured beside the figures of KVP's paper (arXiv 2602.10238)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agents.kvp import KVPConfig
from experiments import evaluate, record
from experiments.jobs import Job
from experiments.learners import KVP, DecodingArgs, RunArgs
from experiments.progress import track
from experiments.reproduce.rank_costs import rank_costs
from experiments.reproduce.study import FAMILIES, Contestant, Study, record_store, train_job
from experiments.runs import to_json
from kvenv.files import read_json, write_atomic
from kvenv.models import load_model
from kvenv.traces import load_traces

STEP = KVPConfig.learning_rate
OBJECTIVES: dict[str, dict[str, Any]] = {
    "reinforce": {},
    "reinforce, paper": {"credit": "ranking", "power": 1.0},
    "cost": {"objective": "cost"},
    "regression": {"objective": "regression"},
    "regression, power 1": {"objective": "regression", "power": 1.0},
    "pairwise": {"objective": "pairwise"},
    **{
        f"soft-rank, step {factor:g}": {"objective": "soft-rank", "learning_rate": factor * STEP}
        for factor in (0.1, 1, 10)
    },
}
"""Hyper-parameters that differ from kvp's defaults; the paper's three step sizes are a decade apart, too."""
SYNTHETIC, DIALOGUE = "kvp-synthetic", "kvp-dialogue"
KINDS = {SYNTHETIC: "recall+tracking", DIALOGUE: "dialogue"}
"""What stands for KVP_R, trained on RULER, and for KVP_S, trained on dialogue."""
ATTENTION = ("tova", "snapkv", "h2o", "r-kv", "expected-attention")
"""Heuristics that see attention; the paper has the first two."""


FREE = ("knorm", "keydiff", "streaming", "lagkv")
"""Heuristics that see none."""


@dataclass(frozen=True)
class Size:
    """How much is trained and measured; the defaults are the committed page's, smaller ones are for trying it out.

    Attributes
    ----------
    store_traces : int
        Recorded traces that each policy learns from.
    updates : int
        Of each training.
    budget : int
        At which the trained policies are measured.
    num_traces : int
        Test traces of each family for that.
    cost_traces : int
        Test traces of each family on which rankings are compared with the oracle's.
    cuts, cost_budgets : tuple of int
        How many pairs are ranked there, and how many budgets would keep of them.
    """

    store_traces: int = 300
    updates: int = 300
    budget: int = 64
    num_traces: int = 64
    cost_traces: int = 32
    cuts: tuple[int, ...] = (128, 256, 384)
    cost_budgets: tuple[int, ...] = (32, 64, 96)


class KVPStudy(Study[Size]):
    """All jobs, and what they wrote."""

    def jobs(self) -> list[Job]:
        """Return all jobs."""
        size, names = self.size, [*OBJECTIVES, *KINDS]
        stores = {"all": "+".join(FAMILIES), **KINDS}
        trainings = [
            self.job(_file(name), train_job, self.arguments(name), after=(f"store-{_store(name)}",)) for name in names
        ]
        test = evaluate.Args(traces=FAMILIES, num_traces=size.num_traces, budgets=(size.budget,), batch_size=32)
        trained = [self.trained(name, _file(name)) for name in names]
        known = [Contestant(name, name) for name in ("kvp-tiny", "random", *ATTENTION)]
        ranked = [*trained, *known, *(Contestant(name, name) for name in FREE)]
        return [
            *(self._recording(name, traces) for name, traces in stores.items()),
            *trainings,
            *self.measurement("test", test, [*trained, *known]),
            self.job(
                "costs", judge_rankings, replace(test, num_traces=size.cost_traces), ranked, self.size,
                self.out / "costs.json", after=tuple(need for one in ranked for need in one.after),
            ),
        ]  # fmt: skip

    def arguments(self, name: str) -> KVP:
        """Return the arguments of a training: one of the objectives, or of the kinds of traces."""
        config = KVPConfig(updates=self.size.updates, **OBJECTIVES.get(name, {}))
        run = RunArgs(eval_every=0, save_every=100, out=self.run(_file(name)))
        return KVP(DecodingArgs(), config, run, self.out / "stores" / _store(name))

    def terms(self) -> dict[str, Any]:
        """Return the numbers and hyper-parameters that everything is trained and measured with."""
        return to_json(self.size) | {name: to_json(self.arguments(name).learner) for name in OBJECTIVES}

    def costs(self) -> dict[str, np.ndarray]:
        """Return what rankings cost, by policy: arrays (traces, layers, heads, 2 + budgets), see ``rank_costs``."""
        found = read_json(self.out / "costs.json", "what rankings cost")
        return {name: np.array(values) for name, values in found.items()}

    def _recording(self, name: str, traces: str) -> Job:
        args = record.Args(out=self.out / "stores" / name, traces=traces, num_traces=self.size.store_traces)
        return self.job(f"store-{name}", record_store, args)


def judge_rankings(
    args: evaluate.Args, contestants: Sequence[Contestant], size: Size, path: Path, result: Path
) -> None:
    """Write what rankings cost on the traces of all families, one family after the other."""
    loaded = load_model(args.model)
    policies = {one.name: policy for one in contestants if (policy := one.make(args.device)) is not None}
    found: dict[str, list[Any]] = {}
    for family in args.traces:
        source = load_traces(family, split=args.split, tokenizer=loaded.tokenizer, trace_length=args.trace_length)
        for start in track(range(0, args.num_traces, 4), f"ranking {family}"):
            traces = [source[i] for i in range(start, min(start + 4, args.num_traces))]
            costs = rank_costs(policies, traces, model=loaded.model, cuts=size.cuts, budgets=size.cost_budgets)
            for name, values in costs.items():
                found.setdefault(name, []).extend(values.tolist())
    write_atomic(path, json.dumps(found) + "\n")
    write_atomic(result, "")


def _file(name: str) -> str:
    """Return the name of a training as one that a file can have."""
    return name.replace(", ", "-").replace(" ", "-")


def _store(name: str) -> str:
    """Return what a policy learns from."""
    return name if name in KINDS else "all"
