"""``python -m experiments.soak``: do everything in one process for long, and compare what it holds early and late."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tyro
from rich import box
from rich.table import Table

from experiments import record
from experiments.bench.machine import facts
from experiments.bench.memory import status
from experiments.cli import run
from experiments.runs import commit
from experiments.soak.environments import INTERVAL, LENGTH
from experiments.soak.held import FEWEST, Change, Measure
from experiments.soak.restarts import RESTARTS
from experiments.soak.rounds import PHASES, Soaked, soak
from experiments.tables import wide_console
from kvenv.files import write_atomic

READING = """\
After each phase of each round, what nobody refers to is collected and free memory given back (malloc_trim). Then the
whole process is measured: resident memory, mapped files included; blocks of Python's allocator; tensors; open files;
threads; child processes, unreaped ones included; mappings of stores and weights. The first quarter of the rounds warms
up; shown is the median of the next ones, a quarter of the others, and how that of the last quarter differs.
Flat: memory and blocks within 2 %, the rest the same. Known to grow: safetensors 0.8.0 loses one or two small integers
for every tensor that it reads from a file, about 1,500 blocks or 50 kB a round here, which is what blocks show."""


@dataclass
class Args:
    """Do everything in one process for long; exit with 1 unless it holds no more at the end than early on.

    Resident memory and Python's objects may change by 2 %; tensors, open files, threads, child processes and mapped
    files not at all.
    """

    steps: int = 100_000
    """Environment steps, decisions of one trace, over all rounds; what generates or trains comes on top."""
    rounds: int = 24
    """Rounds; each goes through all phases, and restarts every learner once."""
    phases: tuple[str, ...] = ()
    """Which phases, e.g. to find the one that leaks; all if none is named."""
    device: str = "cpu"
    """cpu or cuda."""
    out: Path = Path("runs/soak")
    """Directory for soak.txt, which is what is printed, and soak.json, every sample."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; the exit code is 1 if anything isn't flat."""
    args = tyro.cli(Args, args=argv, prog="kvenv soak")
    _check(args)
    phases = {name: PHASES[name] for name in args.phases or PHASES}
    with TemporaryDirectory(prefix="kvenv-soak-") as name:
        directory = Path(name)
        store: Any = {"trace_length": LENGTH, "interval": INTERVAL, "batch_size": 4, "device": args.device}
        record.record_store(record.Args(out=directory / "store", num_traces=16, **store))
        soaked = soak(phases, steps=args.steps, rounds=args.rounds, directory=directory, device=args.device)
    about = {
        "command": " ".join(["python -m experiments.soak", *(sys.argv[1:] if argv is None else argv)]),
        "date": str(datetime.now(timezone.utc).date()),
        "commit": commit(),
        "machine": facts(args.device),
    }
    console = wide_console()
    console.record = True
    console.print(f"{about['command']}, {about['date']}, commit {about['commit']}", soft_wrap=True)
    console.print(", ".join(f"{name} {value}" for name, value in facts(args.device).items() if value))
    console.print(READING, table(soaked), verdict(soaked), sep="\n")
    write_atomic(args.out / "soak.txt", console.export_text())
    samples = {phase: _samples(soaked, column) for column, phase in enumerate(soaked.phases)}
    write_atomic(args.out / "soak.json", json.dumps(about | {"rounds": samples}, indent=1) + "\n")
    if soaked.leaking:
        raise SystemExit(1)


def table(soaked: Soaked) -> Table:
    """Return what each phase did, and what the process held after it, early and late."""
    shown = Table("after", box=box.SIMPLE, padding=(0, 1))
    for heading in ("steps", "seconds", *soaked.measures, "flat"):
        shown.add_column(heading, justify="right")
    for phase, steps, seconds in zip(soaked.phases, soaked.steps.sum(axis=0), soaked.seconds.sum(axis=0)):
        cells = [_shown(soaked.change(phase, name), measure) for name, measure in soaked.measures.items()]
        flat = "no" if soaked.grown(phase) else "yes"
        shown.add_row(phase, f"{steps:,}" if steps else "", f"{seconds:,.0f}", *cells, flat)
    return shown


def verdict(soaked: Soaked) -> str:
    """Return what it comes to."""
    lines = [f"not flat after {phase}: {', '.join(soaked.grown(phase))}" for phase in soaked.leaking]
    restarts = [phase for phase in soaked.phases if phase in RESTARTS]
    done = f"{soaked.steps.sum():,} environment steps, {len(soaked.steps)} rounds"
    if restarts:
        done += f", in each a restart of {', '.join(restarts)}"
    peak = f"at most {status('VmHWM') / 1e6:,.0f} MB were resident at any moment"
    taken = f"{time.process_time():,.0f} s of processor time"
    return "\n".join([*lines, f"{done}; {taken}; {peak}: {'NOT FLAT' if lines else 'flat'}"])


def _shown(change: Change, measure: Measure) -> str:
    """Return what was held early, and what changed: in percent where a little may, else the amount held late."""
    first, last = (f"{x / measure.unit:,.0f}" for x in (change.first, change.last))
    if measure.allowed:
        return f"{first} {100 * change.relative:+.2f} %"
    return first if change.first == change.last else f"{first} → {last}"


def _samples(soaked: Soaked, column: int) -> dict[str, list[float]]:
    """Return what a phase did and what was held after it, round by round."""
    held = dict(zip(soaked.measures, soaked.held[:, column].T.tolist()))
    return {"steps": soaked.steps[:, column].tolist(), "seconds": soaked.seconds[:, column].round(2).tolist(), **held}


def _check(args: Args) -> None:
    """Refuse what can't be soaked."""
    for name in args.phases:
        if name not in PHASES:
            raise ValueError(f"unknown phase {name!r}: known are {', '.join(PHASES)}")
    for name, value, least in (("steps", args.steps, 1), ("rounds", args.rounds, FEWEST)):
        if value < least:
            raise ValueError(f"{name} {value} is impossible: it must be at least {least}")


if __name__ == "__main__":
    run(main)
