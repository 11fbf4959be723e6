"""Compare the choices that imitation leaves open: losses, features, inputs, and who leads the episodes.

``python -m experiments.ablation imitation`` trains one policy per variant on the training traces, measures all of them
on the same validation traces, and writes a table and its numbers. It is the work of half an hour on one core; what was
measured stays, and a second call goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import agents
import kvenv
from agents.imitation import ImitationConfig, ImitationLearner
from experiments.cli import run
from experiments.learners import EnvironmentArgs
from experiments.progress import track
from experiments.runs import commit
from kvenv.evaluation import evaluate
from kvenv.features import feature_set
from kvenv.files import write_atomic
from kvenv.layerwise import Policy
from kvenv.models import load_model
from kvenv.state import LayerState
from kvenv.traces import load_traces

FAMILIES = ("recall", "tracking", "dialogue", "reasoning")
RIVALS = ("golden", "keydiff", "lagkv", "expected-attention", "random")
"""Measured beside the variants; the three heuristics are the best on validation traces."""


def pairs(state: LayerState) -> Tensor:
    """Key and value alone."""
    return feature_set("kv").compute(state)[..., :-1]


def foresight_position(state: LayerState) -> Tensor:
    """Key, value, attention statistics and position."""
    return torch.cat([feature_set("foresight").compute(state), state.positions[..., None].float()], dim=-1)


kvenv.register_features("pairs", pairs, lambda head_dim, groups: 2 * head_dim)
kvenv.register_features(
    "foresight+position",
    foresight_position,
    lambda head_dim, groups: 2 * head_dim + 8 * groups + 1,
    frozenset({"stats"}),
)


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


VARIANTS = [
    *(Variant(features, {}) for features in ("pairs", "kv", "foresight", "foresight+position")),
    *(Variant(features, {"inputs": how}) for features in ("kv", "foresight") for how in ("standardised", "raw")),
    *(Variant("foresight", {"loss": loss}) for loss in ("pairwise", "regression", "listwise", "likelihood")),
    *(Variant("foresight", {"dagger": share}) for share in (0.5, 1.0)),
    *(Variant("kv", {"loss": loss}) for loss in ("pairwise", "regression", "listwise", "likelihood")),
    Variant("foresight+position", {"loss": "listwise"}),
    Variant("foresight", {"loss": "listwise", "dagger": 0.5}),
]


@dataclass
class Args:
    """Compare the choices that a learner leaves open."""

    learner: tyro.conf.Positional[Literal["imitation"]]
    """Whose choices."""
    updates: int = 400
    """Gradient steps of each variant."""
    budget: int = 64
    """Pairs that every (layer, KV head) keeps, in training and measuring."""
    num_traces: int = 16
    """Validation traces of each family."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the training."""
    out: Path = Path("experiments/results")
    """Directory for imitation.json and imitation.md."""


def train(variant: Variant, args: Args, seed: int) -> tuple[Policy, float]:
    """Return a variant's policy and the seconds that its training took."""
    environment = EnvironmentArgs(features=variant.features, budget=args.budget)
    config = replace(ImitationConfig(updates=args.updates, seed=seed), **variant.changes)
    learner = ImitationLearner(environment.make(), config)
    began = time.perf_counter()
    for _ in range(args.updates):
        learner.update()
    return learner.policy, time.perf_counter() - began


def measure(policy: Policy, args: Args) -> dict[str, dict[str, float]]:
    """Return a policy's mean answer loss, accuracy and agreement with golden on each family's validation traces."""
    loaded, found = load_model("tiny"), {}
    for family in FAMILIES:
        source = load_traces(family, split="validation", tokenizer=loaded.tokenizer)
        batches = evaluate(
            {policy.name: policy}, source, range(args.num_traces), model=loaded.model, budgets=(args.budget,)
        )
        rows = [asdict(row) for batch in batches for row in batch]
        found[family] = {
            metric: float(np.mean([row[metric] for row in rows if row[metric] is not None]))
            for metric in ("answer_loss", "answer_accuracy", "agreement_with_golden")
        }
    return found


def compare(args: Args) -> dict[str, Any]:
    """Measure what isn't there yet, writing after each; return all."""
    path = args.out / f"{args.learner}.json"
    terms = {"updates": args.updates, "budget": args.budget, "num_traces": args.num_traces, "split": "validation"}
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"terms": terms, "rows": {}}
    if there["terms"] != terms:
        raise ValueError(f"{path} was measured with {there['terms']}, not {terms}: choose another --out")
    todo: list[tuple[str, Variant | None, int]] = [(name, None, 0) for name in RIVALS]
    todo += [(f"{variant.name} (seed {seed})", variant, seed) for seed in args.seeds for variant in VARIANTS]
    for name, variant, seed in track([x for x in todo if x[0] not in there["rows"]], "variants"):
        policy, seconds = train(variant, args, seed) if variant else (agents.make(name), 0.0)
        there["rows"][name] = {"seconds": round(seconds, 1), "families": measure(policy, args)}
        there |= {"commit": commit(), "date": datetime.now(timezone.utc).date().isoformat()}
        write_atomic(path, json.dumps(there, indent=1) + "\n")
        write_atomic(path.with_suffix(".md"), table(there))
    return there


def table(found: dict[str, Any]) -> str:
    """Return the numbers as Markdown: answer loss by family, means over families, best first."""

    def mean(row: dict[str, Any], metric: str) -> float:
        return float(np.mean([row["families"][family][metric] for family in FAMILIES]))

    terms = found["terms"]
    lines = [
        f"Answer loss in nats on {terms['num_traces']} {terms['split']} traces of each family at budget "
        f"{terms['budget']} of 512 tokens, after {terms['updates']} updates. {found['date']}, commit "
        f"{found['commit']}; made by `python -m experiments.ablation imitation`.",
        "",
        f"| features, changes to the defaults | {' | '.join(FAMILIES)} | mean | accuracy | as golden | training |",
        f"| --- |{' --- |' * (len(FAMILIES) + 4)}",
    ]
    for name, row in sorted(found["rows"].items(), key=lambda item: mean(item[1], "answer_loss")):
        losses = [f"{row['families'][family]['answer_loss']:.3f}" for family in FAMILIES]
        means = [f"{mean(row, metric):.3f}" for metric in ("answer_loss", "answer_accuracy", "agreement_with_golden")]
        lines.append(f"| {' | '.join([name, *losses, *means])} | {row['seconds']:.0f} s |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    print(table(compare(tyro.cli(Args, args=argv, prog="kvenv ablation"))))


if __name__ == "__main__":
    run(main)
