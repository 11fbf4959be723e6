"""Measure what there is to learn: golden, random and the heuristics on every trace family.

At a budget of an eighth of the trace length a family is worth learning on if random evictions hurt, golden ones don't,
and no heuristic, but an oracle that knows only the past (golden-expected), comes near golden.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from rich.table import Table

import agents
from experiments import evaluate
from experiments.comparison import Comparison, Estimate
from experiments.results import write_rows
from experiments.tables import report as report_rows
from experiments.tables import wide_console
from kvenv.evaluation import FULL, Row
from kvenv.files import check_writable, write_atomic

NOT_HEURISTICS = ("random", "golden", "golden-expected")
FAMILIES_NEEDED = 3
"""Families on which the two requirements about the best heuristic must hold."""


@dataclass
class Args:
    """Measure what there is to learn on every trace family, at a budget of 1/8 of the trace length."""

    traces: tuple[str, ...] = ("recall", "tracking", "dialogue", "reasoning")
    """Trace families."""
    trace_length: int = 512
    """Tokens of a trace."""
    num_traces: int = 50
    """Traces of each family."""
    first_trace: int = 0
    """Id of the first trace in the split's sequence."""
    split: str = "validation"
    """Split of the traces; families are never tuned on test."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the noise."""
    interval: int = 16
    """Tokens decoded between two evictions."""
    expected: bool = True
    """Whether to run golden-expected, which costs seconds per trace on a CPU."""
    out: Path = Path("runs/headroom")
    """Directory for headroom.json, results.json, loss.png and TensorBoard event files."""
    model: str = "tiny"
    """The LLM: "tiny", a directory, a hub id or a registered name."""
    batch_size: int = 16
    """Traces decoded side by side, an eighth of them for golden-expected, which reads 16 continuations of each."""
    device: str = "cpu"
    """PyTorch device."""
    dtype: str = "float32"
    """The LLM's dtype."""

    @property
    def budget(self) -> int:
        """Pairs that are kept."""
        return self.trace_length // 8


@dataclass(frozen=True)
class Requirement:
    """One thing a family must show.

    Attributes
    ----------
    family : str
        Which.
    text : str
        What is asked of the difference.
    difference : Estimate
        Paired difference of answer losses in nats.
    met : bool
        Whether its mean is as asked.
    """

    family: str
    text: str
    difference: Estimate
    met: bool


def requirements(comparison: Comparison, family: str, budget: int) -> list[Requirement]:
    """Return what a family shows: four requirements, three without golden-expected.

    Parameters
    ----------
    comparison : Comparison
        Of full, golden, random, the heuristics and golden-expected, if it was run.
    family, budget : str, int
        Which cell.
    """

    def loss(policy: str) -> float:
        return float(np.nanmean(comparison.values(family, policy, budget, "answer_loss")))

    def difference(one: str, other: str) -> Estimate:
        return comparison.difference(family, one, other, budget)

    best = min((p for p in comparison.policies if p not in (*NOT_HEURISTICS, FULL)), key=loss)
    random, golden, heuristic = difference("random", "golden"), difference("golden", FULL), difference(best, "golden")
    found = [
        Requirement(family, "random − golden ≥ 1.0", random, random.mean >= 1.0),
        Requirement(family, "golden − full ≤ 0.3", golden, golden.mean <= 0.3),
        Requirement(family, f"best heuristic ({best}) − golden > 0.3", heuristic, heuristic.mean > 0.3),
    ]
    if "golden-expected" in comparison.policies:
        causal = difference(best, "golden-expected")
        text = f"best heuristic ({best}) − golden-expected ≥ 0.3"
        found.append(Requirement(family, text, causal, causal.mean >= 0.3))
    return found


def verdicts(found: Sequence[Requirement]) -> dict[str, bool]:
    """Return which requirements hold over all families: the first two on each, the others on at least three."""
    holds: dict[str, list[bool]] = {}
    for requirement in found:
        name = requirement.text.split(" (")[0] + requirement.text.partition(")")[2]
        holds.setdefault(name, []).append(requirement.met)
    return {name: sum(met) >= FAMILIES_NEEDED if "best" in name else all(met) for name, met in holds.items()}


def make_table(found: Sequence[Requirement]) -> Table:
    """Return the requirements by family."""
    table = Table(title="Headroom in answer loss (nats)")
    for heading in ("traces", "requirement", "difference", ""):
        table.add_column(heading, justify="right" if heading == "difference" else "left")
    for requirement in found:
        estimate = requirement.difference
        interval = f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
        mark = "[green]met" if requirement.met else "[red]missed"
        table.add_row(requirement.family, requirement.text, interval, mark)
    return table


def measure(args: Args) -> tuple[list[Row], dict[str, float]]:
    """Return all rows, and seconds per trace of golden-expected and of all the others together."""
    options = asdict(args)
    expected = options.pop("expected")
    policies = (FULL, *(name for name in agents.names(trained=False) if name != "golden-expected"))
    out = options.pop("out")
    others = evaluate.Args(**options, budgets=(args.budget,), policies=policies, out=out / "others")
    runs = {"others": others}
    if expected:
        batch_size = max(1, args.batch_size // 8)
        runs["golden-expected"] = replace(
            others, policies=("golden-expected",), batch_size=batch_size, out=args.out / "golden-expected"
        )
    rows: list[Row] = []
    seconds = {}
    for name, run in runs.items():
        start = time.monotonic()
        rows += evaluate.measure(run)
        seconds[name] = (time.monotonic() - start) / (args.num_traces * len(args.traces))
    write_rows(rows, args.out / "results.json")
    return rows, seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = tyro.cli(Args, args=argv, prog="kvenv headroom")
    console = wide_console()
    check_writable(args.out)
    rows, seconds = measure(args)
    comparison = report_rows(rows, args.out, console)
    found = [r for family in comparison.families for r in requirements(comparison, family, args.budget)]
    overall = verdicts(found)
    console.print(make_table(found))
    for name, met in overall.items():
        where = f"on at least {FAMILIES_NEEDED} families" if "best" in name else "on every family"
        console.print(f"{name} {where}: {'met' if met else 'missed'}")
    for name, each in seconds.items():
        console.print(f"{name}: {each:.2f} s per trace on {args.device}")
    report = {
        "arguments": asdict(args) | {"out": str(args.out)},
        "budget": args.budget,
        "requirements": [asdict(requirement) for requirement in found],
        "overall": overall,
        "seconds_per_trace": seconds,
    }
    write_atomic(args.out / "headroom.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    console.print(f"report: {args.out / 'headroom.json'}")


if __name__ == "__main__":
    from experiments.cli import run

    run(main)
