"""``python -m experiments.bench [SECTION...]``: measure, print tables, write bench.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path

import numpy as np
import tyro
from rich import box
from rich.table import Table

from experiments.bench import GPU_ONLY, SECTIONS
from experiments.bench.machine import facts
from experiments.bench.measure import Row
from experiments.cli import run
from experiments.progress import track
from experiments.runs import commit
from experiments.tables import wide_console
from kvenv.files import check_writable, read_json, write_atomic


@dataclass
class Args:
    """Measure how fast kvenv is, beside what it is to be compared with."""

    sections: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which parts; all that the device is for if none is named."""
    device: str = "cpu"
    """cpu or cuda."""
    out: Path = Path("runs/bench")
    """Directory for bench.json, to which sections are added."""


def table(section: str, rows: Sequence[Row]) -> Table:
    """Return a section's table."""
    shown = Table(title=section, box=box.SIMPLE, padding=(0, 1))
    for heading in ("case", "what", "value", "baseline", "unit", "ratio", "target", "over floor"):
        shown.add_column(heading, justify="left" if heading in ("case", "what", "unit", "target") else "right")
    for row in rows:
        met = {None: "", True: "met", False: "missed"}[row.met]
        shown.add_row(
            row.case, row.metric, _number(row.value), _number(row.baseline), row.unit,
            " ± ".join(f"{x:.2f}" for x in (row.ratio, row.spread) if not np.isnan(x)),
            f"{row.target} {met}".strip(), _number(_over_floor(row)),
        )  # fmt: skip
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sections."""
    args = tyro.cli(Args, args=argv, prog="kvenv bench")
    for section in args.sections:
        if section not in SECTIONS:
            raise ValueError(f"unknown section {section!r}: known are {', '.join(SECTIONS)}")
    check_writable(args.out)
    console = wide_console()
    path = args.out / "bench.json"
    there = read_json(path, "a bench.json") if path.exists() else {"sections": {}}
    on_gpu = args.device.startswith("cuda")
    for section in args.sections or [name for name in SECTIONS if on_gpu or name not in GPU_ONLY]:
        rows: list[Row] = []
        try:
            rows.extend(track(import_module(f"experiments.bench.{section}").rows(args.device), section))
        finally:
            # What was measured before something failed is shown all the same.
            if rows:
                console.print(table(section, rows))
        there["sections"][section] = {
            "machine": facts(args.device), "commit": commit(), "date": datetime.now(timezone.utc).date().isoformat(),
            "command": " ".join(["python -m experiments.bench", *(sys.argv[1:] if argv is None else argv)]),
            "rows": [_json(row) for row in rows],
        }  # fmt: skip
        write_atomic(path, json.dumps(there, indent=1) + "\n")
    console.print(f"numbers: {path}")


def _json(row: Row) -> dict[str, object]:
    """Return a row for JSON, which knows no NaN."""
    values = asdict(row) | {"met": row.met}
    return {name: None if isinstance(x, float) and np.isnan(x) else x for name, x in values.items()}


def _over_floor(row: Row) -> float:
    """Return how many times the least possible time a row takes."""
    return row.floor / row.value if row.unit == "tokens/s" else row.value / row.floor


def _number(x: float) -> str:
    return "" if np.isnan(x) else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


if __name__ == "__main__":
    run(main)
