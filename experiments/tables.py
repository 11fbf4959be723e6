"""The tables of an evaluation, and its scalars for TensorBoard."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.comparison import Cell, Comparison, Estimate
from kvenv.evaluation import FULL, Row

WIDTH = 120
"""Columns of a table that isn't printed to a terminal."""

SCALARS = ("score", "answer_loss", "answer_accuracy", "lm_loss", "low_entropy_increase", "agreement_with_golden")
"""What goes to TensorBoard, with the budget as step."""

LOW = 8
"""Tenths of the tokens whose full-cache entropy is low (ForesightKV's 80 %)."""


def _with_interval(estimate: Estimate | None, sign: str = "") -> str:
    """Return a mean with its interval, or nothing."""
    if estimate is None:
        return ""
    return f"{estimate.mean:{sign}.3f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _mean(metric: str, form: str = ".3f") -> Callable[[Cell], str]:
    """Return what shows a metric's mean."""
    return lambda cell: f"{cell.estimates[metric].mean:{form}}" if metric in cell.estimates else ""


def _perplexity(cell: Cell) -> str:
    """Return the perplexity per token, of texts that are measured for it."""
    if not cell.family.startswith("perplexity") or "lm_loss" not in cell.estimates:
        return ""
    return f"{math.exp(cell.estimates['lm_loss'].mean):.3f}"


def rise(cell: Cell, low: bool) -> float | None:
    """Return by how much the loss of the tokens of low, or of high entropy rose, as a share of the full cache's.

    That is ForesightKV's motivating figure; None where losses weren't split by entropy.
    """
    if cell.by_entropy is None:
        return None
    part = slice(None, LOW) if low else slice(LOW, None)
    lost, full = (float(losses[part].sum()) for losses in cell.by_entropy)
    return lost / full - 1


def _rise(low: bool) -> Callable[[Cell], str]:
    def show(cell: Cell) -> str:
        value = rise(cell, low)
        return "" if value is None else f"{value:+.0%}"

    return show


COLUMNS: dict[str, Callable[[Cell], str]] = {
    "score": lambda cell: _with_interval(cell.estimates.get("score")),
    "answer\nloss": lambda cell: _with_interval(cell.estimates.get("answer_loss")),
    "minus\ngolden": lambda cell: "" if cell.policy == "golden" else _with_interval(cell.to_golden, "+"),
    "acc.": _mean("answer_accuracy"),
    "LM\nloss": _mean("lm_loss"),
    "ppl.": _perplexity,
    "low-H\nrise": _mean("low_entropy_increase"),
    "low-H\n80 %": _rise(low=True),
    "high-H\n20 %": _rise(low=False),
    "as\ngolden": _mean("agreement_with_golden"),
    "kept": _mean("kept_fraction"),
    "tokens": _mean("generated_tokens", ".0f"),
    "cut": _mean("truncated", ".0%"),
}
"""By heading, what a cell shows there; columns in which no cell shows anything are left out."""

CAPTION = {
    "score": "score: what the task's own metric gives",
    "acc.": "acc.: answer accuracy",
    "minus\ngolden": "· saturated: golden is within 0.05 nat",
    "ppl.": "ppl.: perplexity per token",
    "low-H\nrise": "low-H rise: loss increase on low-entropy tokens",
    "low-H\n80 %": "low-H 80 %, high-H 20 %: relative loss increase on the tokens of lowest, highest entropy",
    "as\ngolden": "as golden: evictions shared",
    "kept": "kept: share of pairs",
    "tokens": "tokens: mean length of answers",
    "cut": "cut: answers that reached the most tokens",
}
"""What the headings mean, said where they are shown."""


def make_table(comparison: Comparison, cells: Sequence[Cell], family: str) -> Table:
    """Return the table of one family: a section per budget, a line per policy."""
    here = [cell for cell in cells if cell.family == family]
    columns = {heading: show for heading, show in COLUMNS.items() if any(show(cell) for cell in here)}
    empty, total = comparison.without_answers(family)
    position = comparison.score_from[family]
    answered = comparison.yardstick(family) == "score"
    told = [text for heading, text in CAPTION.items() if heading in columns]
    table = Table(
        title=f"{family}: {total} {'examples' if answered else f'traces, scored above position {position}'}",
        caption="; ".join(["Mean [95 % interval] over traces × seeds", *told])
        + ". > beats random, < is beaten by it: the paired 95 % interval excludes 0."
        + (f" {empty} traces have no scored answer." if empty and "answer\nloss" in columns else ""),
        box=box.SIMPLE,
        padding=0,
    )
    table.add_column("policy", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=heading not in ("score", "answer\nloss", "minus\ngolden"))
    budget = None
    for cell in here:
        if cell.budget != budget:
            budget = cell.budget
            table.add_section()
            table.add_row(f"budget {budget}", style="underline")
        frame = cell.policy in ("golden", "golden-expected", "random", FULL)
        table.add_row(
            cell.policy
            + " ·" * (cell.saturated and cell.policy not in ("golden", FULL))
            + _against_random(comparison, cell),
            *(show(cell) or "-" * (heading != "minus\ngolden") for heading, show in columns.items()),
            style="bold" if frame else None,
        )
    return table


def _against_random(comparison: Comparison, cell: Cell) -> str:
    """Return the mark of a policy that beats random in its cell, or is beaten by it."""
    if cell.policy in ("random", FULL) or "random" not in comparison.policies:
        return ""
    if comparison.yardstick(cell.family) not in cell.estimates:
        return ""
    if comparison.better(cell.family, cell.policy, "random", cell.budget):
        return " >"
    return " <" if comparison.better(cell.family, "random", cell.policy, cell.budget) else ""


def write_scalars(cells: Sequence[Cell], directory: Path) -> None:
    """Write TensorBoard scalars, one run per family and policy, the budget as step."""
    from torch.utils.tensorboard import SummaryWriter

    for family, policy in dict.fromkeys((cell.family, cell.policy) for cell in cells):
        run = directory / _file_name(family) / _file_name(policy)
        # results.json is written anew; an old event file beside the new one would make its curves zigzag.
        for old in run.glob("events.out.tfevents.*"):
            old.unlink()
        with SummaryWriter(str(run)) as writer:
            for cell in cells:
                if (cell.family, cell.policy) == (family, policy):
                    for metric in SCALARS:
                        if metric in cell.estimates:
                            writer.add_scalar(f"eval/{metric}", cell.estimates[metric].mean, cell.budget)


def _file_name(name: str) -> str:
    """Return a name, which may be a path, as one that a directory can have."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "_"


def wide_console() -> Console:
    """Return a console that doesn't squeeze tables into 80 columns where nobody said how wide it is (a log, a pipe)."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def report(rows: Sequence[Row], out: Path, console: Console) -> Comparison:
    """Print the tables, draw the plots and write the scalars of rows."""
    comparison = Comparison(rows)
    cells = comparison.cells()
    for family in comparison.families:
        console.print(make_table(comparison, cells, family))
    # Imported here: matplotlib takes a second, and bad arguments shall not wait for it.
    from experiments.plots import plot_by_entropy, plot_losses

    plot_losses(cells, out / "loss.png")
    if any(cell.by_entropy is not None for cell in cells):
        plot_by_entropy(cells, out / "entropy.png")
    write_scalars(cells, out / "tensorboard")
    return comparison
