"""Compare the choices that a learner leaves open.

``python -m experiments.ablation imitation``: losses, features, inputs, and who leads the episodes; ``grpo``: rewards,
and what picks are credited with. One policy per variant is trained on the training traces, all are measured on the same
validation traces, in a table and its numbers. Each is the work of half an hour on one core; what was measured stays,
and a second call goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

import agents
from experiments.cli import run
from experiments.progress import track
from experiments.runs import commit
from experiments.variants import FAMILIES, TRAINED, VARIANTS, Terms
from kvenv.evaluation import evaluate
from kvenv.files import check_writable, read_json, write_atomic
from kvenv.layerwise import Policy
from kvenv.models import load_model
from kvenv.traces import load_traces

RIVALS = ("golden", "keydiff", "lagkv", "expected-attention", "random")
"""Measured beside the variants; the three heuristics are the best on validation traces."""

METRICS = {
    "answer_accuracy": "accuracy",
    "lm_loss": "LM loss",
    "low_entropy_increase": "low-entropy increase",
    "agreement_with_golden": "as golden",
}
"""Metrics beside the answer loss, and what the table calls them."""


@dataclass
class Args:
    """Compare the choices that a learner leaves open."""

    learner: tyro.conf.Positional[Literal["imitation", "grpo"]]
    """Whose choices."""
    updates: int = 0
    """Updates of each variant; 0: 48 of imitation, 30 of grpo."""
    budget: int = 48
    """Pairs that every (layer, KV head) keeps, in training and measuring."""
    batch: int = 0
    """Training traces of an update; 0: 16 of imitation, 4 of grpo, each rolled out 8 times."""
    num_traces: int = 16
    """Validation traces of each family."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the training."""
    init: str = "imitation-tiny"
    """Policy that grpo starts from; it is measured, too."""
    out: Path = Path("experiments/results")
    """Directory for LEARNER.json and LEARNER.md."""

    def __post_init__(self) -> None:
        self.updates = self.updates or {"imitation": 48, "grpo": 30}[self.learner]
        self.batch = self.batch or {"imitation": 16, "grpo": 4}[self.learner]

    def rivals(self) -> tuple[str, ...]:
        """Return what is measured beside the variants."""
        return (*RIVALS, self.init) if self.learner == "grpo" else RIVALS


def measure(policies: dict[str, Policy], args: Args) -> dict[str, dict[str, dict[str, float]]]:
    """Return the policies' means on each family's validation traces."""
    loaded = load_model("tiny")
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in policies}
    for family in track(FAMILIES, f"measuring {len(policies)}"):
        source = load_traces(family, split="validation", tokenizer=loaded.tokenizer)
        batches = evaluate(policies, source, range(args.num_traces), model=loaded.model, budgets=(args.budget,))
        rows = [asdict(row) for batch in batches for row in batch]
        for name in policies:
            found[name][family] = {
                metric: float(np.mean([x[metric] for x in rows if x["policy"] == name and x[metric] is not None]))
                for metric in ("answer_loss", *METRICS)
            }
    return found


def compare(args: Args) -> dict[str, Any]:
    """Measure what isn't there yet, writing after each; return all."""
    check_writable(args.out)
    path = args.out / f"{args.learner}.json"
    shared = ("updates", "budget", "batch", "num_traces", *(["init"] if args.learner == "grpo" else []))
    terms = {name: getattr(args, name) for name in shared}
    there = read_json(path, "a comparison") if path.exists() else {"terms": terms, "rows": {}}
    if there["terms"] != terms:
        raise ValueError(f"{path} was measured with {there['terms']}, not {terms}: choose another --out")

    def add(policies: dict[str, Policy]) -> None:
        if policies:
            there["rows"] |= measure(policies, args)
            there.update(commit=commit(), date=datetime.now(timezone.utc).date().isoformat())
            write_atomic(path, json.dumps(there, indent=1) + "\n")
            write_atomic(path.with_suffix(".md"), table(there, args.learner))

    add({name: agents.make(name) for name in args.rivals() if name not in there["rows"]})
    for seed in args.seeds:
        named = {f"{variant.name} (seed {seed})": variant for variant in VARIANTS[args.learner]}
        todo = {name: variant for name, variant in named.items() if name not in there["rows"]}
        for policies in TRAINED[args.learner](todo, Terms(args.updates, args.budget, args.batch, seed, args.init)):
            add(policies)
    return there


def table(found: dict[str, Any], learner: str) -> str:
    """Return the numbers as Markdown: answer loss by family, means over families, best first."""

    def mean(row: dict[str, Any], metric: str) -> float:
        return float(np.mean([row[family][metric] for family in FAMILIES]))

    terms = found["terms"]
    lines = [
        f"Answer loss in nats on {terms['num_traces']} validation traces of each family at budget {terms['budget']} of "
        f"512 tokens, after {terms['updates']} updates of {terms['batch']} traces each. {found['date']}, commit "
        f"{found['commit']}; made by `python -m experiments.ablation {learner}`.",
        "",
        f"| changes to the defaults | {' | '.join(FAMILIES)} | mean | {' | '.join(METRICS.values())} |",
        f"| --- |{' --- |' * (len(FAMILIES) + 1 + len(METRICS))}",
    ]
    for name, row in sorted(found["rows"].items(), key=lambda item: mean(item[1], "answer_loss")):
        losses = [f"{row[family]['answer_loss']:.3f}" for family in FAMILIES]
        means = [f"{mean(row, metric):.3f}" for metric in ("answer_loss", *METRICS)]
        lines.append(f"| {' | '.join([name, *losses, *means])} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    args = tyro.cli(Args, args=argv, prog="python -m experiments.ablation")
    print(table(compare(args), args.learner))


if __name__ == "__main__":
    run(main)
