"""Compare the choices that imitation leaves open: losses, features, inputs, and who leads the episodes.

``python -m experiments.ablation imitation`` trains one policy per variant on the training traces, measures all of them
on the same validation traces, and writes a table and its numbers. It is the work of half an hour on one core; what was
measured stays, and a second call goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

import agents
from agents.imitation import ImitationConfig, ImitationLearner, Student
from agents.ranking_losses import LOSSES
from agents.scorer import ScorerPolicy
from experiments.cli import run
from experiments.progress import track
from experiments.runs import commit
from kvenv.evaluation import evaluate
from kvenv.features import FeatureSet, feature_set
from kvenv.files import write_atomic
from kvenv.layerwise import Policy
from kvenv.models import load_model
from kvenv.traces import load_traces

FAMILIES = ("recall", "tracking", "dialogue", "reasoning")
RIVALS = ("golden", "keydiff", "lagkv", "expected-attention", "random")
"""Measured beside the variants; the three heuristics are the best on validation traces."""


@dataclass(frozen=True)
class Variant:
    """A setting of what is compared.

    Attributes
    ----------
    features : str
        What the scorer sees.
    changes : dict
        Hyper-parameters that differ from the defaults.
    """

    features: str
    changes: dict[str, Any]

    @property
    def name(self) -> str:
        """What the table calls it."""
        return ", ".join([self.features, *(f"{name} {value}" for name, value in self.changes.items())])

    def config(self, args: Args, seed: int) -> ImitationConfig:
        """Return its hyper-parameters."""
        defaults = ImitationConfig(updates=args.updates, num_traces=args.batch, budgets=(args.budget,), seed=seed)
        return replace(defaults, **self.changes)


GOLDEN_LEADS: dict[str, Any] = {"dagger": 0.0}
VARIANTS = [
    *(Variant(features, {}) for features in ("pre-rope", "foresight", "kv")),
    Variant("pre-rope", {"depth": 2}),
    Variant("pre-rope", {"inputs": "raw"}),
    *(Variant("pre-rope", {"loss": loss}) for loss in LOSSES if loss != "team-cost"),
    *(Variant("pre-rope", {"power": power}) for power in (1.0, 2.0, 4.0)),
    Variant("pre-rope", {"ema": 0.0}),
    *(Variant(features, GOLDEN_LEADS) for features in ("pre-rope", "foresight")),
]
"""Those with the same share of DAgger learn from the same caches: golden's, or those of the first of them."""


@dataclass
class Args:
    """Compare the choices that a learner leaves open."""

    learner: tyro.conf.Positional[Literal["imitation"]]
    """Whose choices."""
    updates: int = 12
    """Updates of each variant."""
    budget: int = 48
    """Pairs that every (layer, KV head) keeps, in training and measuring."""
    batch: int = 16
    """Training traces of an update."""
    num_traces: int = 16
    """Validation traces of each family."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the training."""
    out: Path = Path("experiments/results")
    """Directory for imitation.json and imitation.md."""


class Classroom(ImitationLearner):
    """Imitation from whose episodes several students learn, led by golden or by the first student.

    Parameters
    ----------
    variants : sequence of Variant
        The students, with the same leader.
    args : Args
        Budget and updates.
    seed : int
        Of weights and episodes.
    """

    def __init__(self, variants: Sequence[Variant], args: Args, seed: int) -> None:
        self.variants = variants
        self.configs = [variant.config(args, seed) for variant in variants]
        loaded = load_model("tiny")
        source = load_traces("+".join(FAMILIES), split="train", tokenizer=loaded.tokenizer)
        super().__init__(loaded.model, source, self.configs[0])

    def policies(self) -> list[Policy]:
        """Return what the students became."""
        return [
            ScorerPolicy(student.mean, variant.features, variant.name)
            for student, variant in zip(self.students, self.variants, strict=True)
        ]

    def _enrol(self, features: FeatureSet) -> list[Student]:
        return [
            Student(self.episodes.scorer(seen, config.hidden, config.depth, config.seed), seen, config)
            for config, seen in zip(self.configs, (feature_set(x.features) for x in self.variants), strict=True)
        ]


def train(variants: Sequence[Variant], args: Args, seed: int) -> list[Policy]:
    """Return the policies of variants, which learn from the same episodes."""
    classroom = Classroom(variants, args, seed)
    names = variants[0].name if len(variants) == 1 else f"{len(variants)} variants at once"
    for _ in track(range(args.updates), names):
        classroom.update()
    return classroom.policies()


def measure(policies: dict[str, Policy], args: Args) -> dict[str, dict[str, dict[str, float]]]:
    """Return the policies' mean answer loss, accuracy and agreement with golden on each family's validation traces."""
    loaded = load_model("tiny")
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in policies}
    for family in track(FAMILIES, f"measuring {len(policies)}"):
        source = load_traces(family, split="validation", tokenizer=loaded.tokenizer)
        batches = evaluate(policies, source, range(args.num_traces), model=loaded.model, budgets=(args.budget,))
        rows = [asdict(row) for batch in batches for row in batch]
        for name in policies:
            found[name][family] = {
                metric: float(np.mean([x[metric] for x in rows if x["policy"] == name and x[metric] is not None]))
                for metric in ("answer_loss", "answer_accuracy", "agreement_with_golden")
            }
    return found


def compare(args: Args) -> dict[str, Any]:
    """Measure what isn't there yet, writing after each; return all."""
    path = args.out / f"{args.learner}.json"
    terms = {name: getattr(args, name) for name in ("updates", "budget", "batch", "num_traces")}
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"terms": terms, "rows": {}}
    if there["terms"] != terms:
        raise ValueError(f"{path} was measured with {there['terms']}, not {terms}: choose another --out")

    def add(policies: dict[str, Policy]) -> None:
        if policies:
            there["rows"] |= measure(policies, args)
            there.update(commit=commit(), date=datetime.now(timezone.utc).date().isoformat())
            write_atomic(path, json.dumps(there, indent=1) + "\n")
            write_atomic(path.with_suffix(".md"), table(there))

    add({name: agents.make(name) for name in RIVALS if name not in there["rows"]})
    for seed in args.seeds:
        todo = {f"{x.name} (seed {seed})": x for x in VARIANTS if f"{x.name} (seed {seed})" not in there["rows"]}
        for share in dict.fromkeys(variant.config(args, seed).dagger for variant in todo.values()):
            group = {name: variant for name, variant in todo.items() if variant.config(args, seed).dagger == share}
            add(dict(zip(group, train(list(group.values()), args, seed), strict=True)))
    return there


def table(found: dict[str, Any]) -> str:
    """Return the numbers as Markdown: answer loss by family, means over families, best first."""

    def mean(row: dict[str, Any], metric: str) -> float:
        return float(np.mean([row[family][metric] for family in FAMILIES]))

    terms = found["terms"]
    lines = [
        f"Answer loss in nats on {terms['num_traces']} validation traces of each family at budget {terms['budget']} of "
        f"512 tokens, after {terms['updates']} updates of {terms['batch']} traces each. {found['date']}, commit "
        f"{found['commit']}; made by `python -m experiments.ablation imitation`.",
        "",
        f"| features, changes to the defaults | {' | '.join(FAMILIES)} | mean | accuracy | as golden |",
        f"| --- |{' --- |' * (len(FAMILIES) + 3)}",
    ]
    for name, row in sorted(found["rows"].items(), key=lambda item: mean(item[1], "answer_loss")):
        losses = [f"{row[family]['answer_loss']:.3f}" for family in FAMILIES]
        means = [f"{mean(row, metric):.3f}" for metric in ("answer_loss", "answer_accuracy", "agreement_with_golden")]
        lines.append(f"| {' | '.join([name, *losses, *means])} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    print(table(compare(tyro.cli(Args, args=argv, prog="kvenv ablation"))))


if __name__ == "__main__":
    run(main)
