"""Compare policies on the same traces at the same budgets: results.json, a table, a plot and TensorBoard scalars."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import agents
from experiments.comparison import METRICS, Cell, Comparison, Estimate, beats
from experiments.progress import track
from kvenv.evaluation import FULL, Row, evaluate
from kvenv.files import write_atomic
from kvenv.layerwise import Policy
from kvenv.models import load_model
from kvenv.registry import HUB_ID
from kvenv.state import Protection
from kvenv.traces import TraceSource, load_traces

SCALARS = ("answer_loss", "answer_accuracy", "low_entropy_increase", "agreement_with_golden")
"""What goes to TensorBoard, with the budget as step."""


WIDTH = 120
"""Columns of a table that isn't printed to a terminal."""


@dataclass
class Args:
    """Compare policies on the same traces at the same budgets."""

    policies: tuple[str, ...] = ("full", "golden", "random", "streaming", "h2o", "snapkv", "keydiff")
    """Names, directories of learned policies, or "full" for no eviction; "random" is always added."""
    budgets: tuple[int, ...] = (32, 64, 128)
    """Pairs that every (layer, KV head) keeps after an eviction."""
    traces: tuple[str, ...] = ("recall",)
    """Families, files, datasets or registered names."""
    trace_length: int = 512
    """Tokens of a trace."""
    first_trace: int = 0
    """Id of the first trace in the split's sequence."""
    num_traces: int = 200
    """Traces of each family."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the noise; policies without noise run once."""
    out: Path = Path("runs/evaluate")
    """Directory for results.json, loss.png and TensorBoard event files."""
    model: str = "tiny"
    """The LLM: "tiny", a directory, a hub id or a registered name."""
    split: str = "test"
    """Split of the traces: train, validation or test."""
    interval: int = 16
    """Tokens decoded between two evictions."""
    schedule: str = "periodic"
    """"periodic", or "prefill": one eviction, at the end of the prompt."""
    sinks: int = 4
    """First tokens of a trace that are never evicted."""
    recent: int | None = None
    """Newest tokens that are never evicted; the interval if not given."""
    protect_prompt: bool = False
    """Whether the whole prompt is never evicted."""
    score_from: int | None = None
    """Score only targets above this position, e.g. that of a run with larger budgets; the largest budget plus interval
    if not given."""
    batch_size: int = 16
    """Traces decoded side by side."""
    device: str = "cpu"
    """PyTorch device."""
    dtype: str = "float32"
    """The LLM's dtype."""

    def protection(self) -> Protection:
        """Return which pairs are never evicted."""
        return Protection(self.sinks, self.interval if self.recent is None else self.recent, self.protect_prompt)


def make_policies(names: Sequence[str], device: str) -> dict[str, Policy | None]:
    """Return the policies by name, learned ones on ``device``; None is the full cache.

    A saved policy goes by the name saved with it, or by its directory or hub id where another one has that name.

    Raises
    ------
    ValueError
        If a name is unknown; the message lists the known ones.
    """
    known = [FULL, *agents.names()]
    for name in names:
        if name not in known and not Path(name).is_dir() and not HUB_ID.fullmatch(name):
            raise ValueError(
                f"unknown policy {name!r}: known are {', '.join(known)}, or a directory with a policy.json, or a hub id"
            )
    policies: dict[str, Policy | None] = {
        name: None if name == FULL else agents.make(name, **({"device": device} if name in agents.TRAINED else {}))
        for name in names
        if name in known
    }
    for name in names:
        if name not in known:
            learned = agents.make(name, device=device)
            policies[name if learned.name in policies else learned.name] = learned
    return policies


def measure(args: Args) -> list[Row]:
    """Evaluate as ``args`` say and write results.json after every batch of traces."""
    _check(args)
    loaded = load_model(args.model, dtype=args.dtype, device=args.device)
    loaded.check_length(args.trace_length)
    policies = make_policies(args.policies, args.device)
    rows: list[Row] = []
    for name in args.traces:
        source = _source(args, name, loaded.tokenizer)
        cells = evaluate(
            policies,
            source,
            range(args.first_trace, args.first_trace + args.num_traces),
            model=loaded.model,
            budgets=args.budgets,
            interval=args.interval,
            schedule=args.schedule,
            protection=args.protection(),
            seeds=args.seeds,
            score_from=args.score_from,
            batch_size=args.batch_size,
        )
        # Written only when all policies ran on the same traces: what a killed run leaves can be compared, too.
        a_batch = len(args.budgets) * len(policies)
        total = a_batch * -(-args.num_traces // max(1, args.batch_size))
        for number, cell in enumerate(track(cells, f"evaluating on {name}", total=total), start=1):
            rows += cell
            if number % a_batch == 0:
                write_rows(rows, args.out / "results.json")
    return rows


def _check(args: Args) -> None:
    """Refuse what only the command knows to be wrong, or would find out late."""
    for name, values in (("policies", args.policies), ("traces", args.traces)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} {list(values)} must hold at least one and nothing twice")
    if args.num_traces < 1:
        raise ValueError(f"num_traces {args.num_traces} must be at least 1")
    if args.first_trace < 0:
        raise ValueError(f"first_trace {args.first_trace} must be at least 0")
    least = max(args.budgets, default=0) + args.interval
    if args.schedule == "periodic" and args.score_from is not None and args.score_from < least:
        raise ValueError(
            f"score_from {args.score_from} is below the largest budget plus interval: choose {least} or more"
        )


def _source(args: Args, name: str, tokenizer: Any) -> TraceSource:
    """Return the traces of a name, which must be enough."""
    source = load_traces(
        name, split=args.split, tokenizer=tokenizer, trace_length=args.trace_length, schedule=args.schedule
    )
    if source.size is not None and args.first_trace + args.num_traces > source.size:
        raise ValueError(
            f"traces {name!r} are {source.size}: --first-trace {args.first_trace} and --num-traces {args.num_traces} "
            "ask for more"
        )
    return source


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a JSON list, one row a line."""
    write_atomic(path, "[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a results.json.

    Raises
    ------
    ValueError
        If the file is no list of rows.
    """
    try:
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not a results.json: {error}") from error


def make_table(comparison: Comparison, cells: Sequence[Cell], family: str) -> Table:
    """Return the table of one family: a section per budget, a line per policy."""
    empty, total = comparison.without_answers(family)
    table = Table(
        title=f"{family}: {total} traces, scored above position {comparison.score_from[family]}",
        caption="Mean [95 % interval] over traces × seeds; acc.: answer accuracy; low-H rise: loss increase on "
        "low-entropy tokens; as golden: evictions shared; kept: share of pairs. · saturated: golden is within 0.05 "
        "nat. > beats random, < is beaten by it: the paired 95 % interval excludes 0."
        + (f" {empty} traces have no scored answer." if empty else ""),
        box=box.SIMPLE,
        padding=0,
    )
    table.add_column("policy", no_wrap=True)
    for heading in ("answer\nloss", "minus\ngolden", "acc.", "LM\nloss", "low-H\nrise", "as\ngolden", "kept"):
        table.add_column(heading, justify="right", no_wrap=heading not in ("answer\nloss", "minus\ngolden"))
    budget = None
    for cell in (cell for cell in cells if cell.family == family):
        if cell.budget != budget:
            budget = cell.budget
            table.add_section()
            table.add_row(f"budget {budget}", style="underline")
        estimates = cell.estimates
        frame = cell.policy in ("golden", "golden-expected", "random", FULL)
        table.add_row(
            cell.policy
            + " ·" * (cell.saturated and cell.policy not in ("golden", FULL))
            + _against_random(comparison, cell),
            _with_interval(estimates.get("answer_loss")),
            "" if cell.policy == "golden" else _with_interval(cell.to_golden, "+"),
            *(
                "-" if metric not in estimates else f"{estimates[metric].mean:.3f}"
                for metric in METRICS
                if metric != "answer_loss"
            ),
            style="bold" if frame else None,
        )
    return table


def _against_random(comparison: Comparison, cell: Cell) -> str:
    """Return the mark of a policy that beats random in its cell, or is beaten by it."""
    if cell.policy in ("random", FULL) or "random" not in comparison.policies or "answer_loss" not in cell.estimates:
        return ""
    pair = (cell.policy, "random")
    if beats(comparison.difference(cell.family, *pair, cell.budget)):
        return " >"
    return " <" if beats(comparison.difference(cell.family, *pair[::-1], cell.budget)) else ""


def _with_interval(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return "-"
    return f"{estimate.mean:{sign}.3f} [{estimate.low:.2f}, {estimate.high:.2f}]"


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
    """Print the tables, draw the plot and write the scalars of rows."""
    comparison = Comparison(rows)
    cells = comparison.cells()
    for family in comparison.families:
        console.print(make_table(comparison, cells, family))
    # Imported here: matplotlib takes a second, and bad arguments shall not wait for it.
    from experiments.plots import plot_losses

    plot_losses(cells, out / "loss.png")
    write_scalars(cells, out / "tensorboard")
    return comparison


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = tyro.cli(Args, args=argv, prog="kvenv evaluate")
    if args.policies and "random" not in args.policies:  # no comparison is without it, see CONTRIBUTING.md
        args = replace(args, policies=(*args.policies, "random"))
    console = wide_console()
    report(measure(args), args.out, console)
    console.print(f"rows: {args.out / 'results.json'}\nplot: {args.out / 'loss.png'}")
    console.print(f"scalars: tensorboard --logdir {args.out / 'tensorboard'}")


if __name__ == "__main__":
    from experiments.cli import run

    run(main)
