"""Compare finished or running trainings: a table and curves by update and by wall clock, without TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.cli import run
from experiments.runs import CONFIG, read_config, read_metrics
from experiments.tables import wide_console
from kvenv.files import write_atomic

CURVES = {
    "eval/answer_loss": "answer loss on validation traces (nats)",
    "eval/low_entropy_increase": "loss increase on low-entropy tokens (nats)",
    "eval/agreement_with_golden": "evictions shared with golden",
    "rollout/ep_rew_mean": "return of training episodes (kvp: of KVRank-v0)",
}
"""What is drawn, by tag."""
COLUMNS = {
    "eval/answer_loss": "answer loss",
    "eval/answer_accuracy": "accuracy",
    "eval/lm_loss": "LM loss",
    "eval/low_entropy_increase": "low-H rise",
    "eval/agreement_with_golden": "as golden",
    "rollout/ep_rew_mean": "return",
}
"""What the table holds of a run's end, by tag."""


@dataclass
class Args:
    """Compare runs of `kvenv train`: a table, and curves by update and by wall clock."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs."""
    out: Path = Path("runs/report")
    """Directory for report.md and report.png."""


@dataclass(frozen=True)
class Curves:
    """What a run measured.

    Attributes
    ----------
    name : str
        What the report calls it.
    learner : str
        What trained.
    updates, planned : int
        Made, and to be made.
    lines : list of dict
        Its metrics, a line per step.
    """

    name: str
    learner: str
    updates: int
    planned: int
    lines: list[dict[str, float]]

    @property
    def seconds(self) -> float:
        """Seconds of training, evaluation and interruptions left out."""
        return self.lines[-1].get("time/total", 0.0)

    def of(self, tag: str) -> tuple[list[float], list[float], list[float]]:
        """Return the steps at which a tag was measured, the seconds of training by then, and its values."""
        lines = [line for line in self.lines if tag in line]
        return [x["step"] for x in lines], [x.get("time/total", 0.0) for x in lines], [x[tag] for x in lines]

    def last(self, tag: str) -> float | None:
        """Return a tag's last value, None if it never was measured."""
        values = self.of(tag)[2]
        return values[-1] if values else None

    def best(self, tag: str) -> tuple[float, int] | None:
        """Return a tag's lowest value and its step, None if it never was measured."""
        steps, _, values = self.of(tag)
        return min(zip(values, map(int, steps), strict=True), default=None)


def load(directories: Sequence[Path]) -> list[Curves]:
    """Return the curves of runs, named by the ends of their paths in which they differ.

    Raises
    ------
    ValueError
        If there is no run, one is given twice, or a directory is no run or has measured nothing.
    """
    if not directories:
        raise ValueError("there are no runs to report: give their directories")
    resolved = [directory.resolve() for directory in directories]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"runs {' '.join(map(str, directories))}: one is given twice")
    found = []
    for directory, name in zip(directories, _names(resolved), strict=True):
        config, lines = read_config(directory), read_metrics(directory)
        if not lines:
            raise ValueError(f"{directory} has measured nothing yet")
        try:
            planned = int(config["arguments"]["learner"]["updates"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{directory / CONFIG} doesn't say how many updates were planned") from error
        found.append(Curves(name, str(config["learner"]), int(lines[-1]["step"]), planned, lines))
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of different paths that differ."""
    parts = 1
    while len(names := {str(Path(*path.parts[-parts:])) for path in paths}) < len(paths):
        parts += 1
    return [str(Path(*path.parts[-parts:])) for path in paths] if names else []


def cells(run: Curves) -> list[str]:
    """Return a run's line of the table."""
    best = run.best("eval/answer_loss")
    values = [run.last(tag) for tag in COLUMNS]
    return [
        run.name,
        run.learner,
        f"{run.updates}" if run.updates == run.planned else f"{run.updates} of {run.planned}",
        f"{run.seconds:.0f} s",
        *("-" if value is None else f"{value:.3f}" for value in values),
        "-" if best is None else f"{best[0]:.3f} @ {best[1]}",
    ]


HEADINGS = ["run", "learner", "updates", "training", *COLUMNS.values(), "best answer loss @ update"]


def make_table(runs: Sequence[Curves]) -> Table:
    """Return the comparison for a terminal."""
    table = Table(title="Runs at their ends, on validation traces", box=box.SIMPLE, padding=(0, 1))
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for one in runs:
        table.add_row(*cells(one))
    return table


def markdown(runs: Sequence[Curves]) -> str:
    """Return the comparison as Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(cells(one) for one in runs)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def report(runs: Sequence[Curves], out: Path, console: Console) -> None:
    """Print the table; write it and the curves."""
    # Imported here: matplotlib takes a second, and bad arguments shall not wait for it.
    from experiments.plots import plot_curves

    console.print(make_table(runs))
    write_atomic(out / "report.md", markdown(runs))
    panels = {label: {one.name: one.of(tag) for one in runs if one.of(tag)[0]} for tag, label in CURVES.items()}
    plot_curves({label: curves for label, curves in panels.items() if curves}, out / "report.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = tyro.cli(Args, args=argv, prog="kvenv report")
    console = wide_console()
    report(load(args.runs), args.out, console)
    console.print(f"table: {args.out / 'report.md'}\ncurves: {args.out / 'report.png'}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
