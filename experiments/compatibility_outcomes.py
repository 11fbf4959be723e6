"""The rows of the compatibility matrix, what became of each, and the tables of that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from experiments.runs import commit

LIBRARIES = ("gymnasium", "transformers", "stable-baselines3")
EVERYTHING = "lowest-everything"
ROWS: dict[str, tuple[str, ...]] = {
    "newest": (),
    "lowest": LIBRARIES,
    **{f"lowest-{library}": (library,) for library in LIBRARIES},
    EVERYTHING: LIBRARIES,
}
"""Of which libraries a row has the lowest version allowed; others are as new as these let them be."""
WITHOUT = "without-pytorch"


@dataclass(frozen=True)
class Outcome:
    """What became of a row.

    Attributes
    ----------
    row : str
        One of :data:`ROWS`, or ``without-pytorch``.
    versions : dict
        Of Python, PyTorch and the libraries: what was installed; without PyTorch, what pip would install.
    tests : dict
        ``passed``, ``failed``, ``skipped``.
    failures : list of str
        The tests that failed.
    checks : dict
        What ``compatibility_peer`` found without PyTorch.
    error : str
        Why there is no more.
    date, commit : str
        When, and of which kvenv.
    """

    row: str
    versions: dict[str, str]
    tests: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    date: str = field(default_factory=lambda: str(datetime.now(timezone.utc).date()))
    commit: str | None = field(default_factory=commit)

    @property
    def python(self) -> tuple[int, ...]:
        """Python's major and minor version."""
        return tuple(int(part) for part in self.versions["python"].split(".")[:2])

    @property
    def good(self) -> bool:
        """Whether all went well."""
        return not self.error and not self.tests["failed"]


def merged(known: Sequence[Outcome], new: Outcome) -> list[Outcome]:
    """Return outcomes in order, with a new one in place of that of the same row and Python."""
    rows = [*ROWS, WITHOUT]
    kept = [each for each in known if (each.row, each.python) != (new.row, new.python)]
    return sorted([*kept, new], key=lambda each: (each.row == WITHOUT, each.python, rows.index(each.row)))


def read(path: Path) -> list[Outcome]:
    """Return what was found up to now."""
    return [Outcome(**each) for each in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def table(outcomes: Sequence[Outcome]) -> str:
    """Return outcomes as the tables of the README, in Markdown."""
    names = ("torch", *LIBRARIES)
    full = [
        [each.versions["python"], *(each.versions.get(name, "") for name in names), f"`{each.row}`", *_tests(each)]
        for each in outcomes
        if each.row != WITHOUT
    ]
    without = [
        [each.versions["python"], *(str(each.checks.get(name, "")) for name in ("files", "modules", "stopped")),
         ", ".join(each.checks.get("ids", ())), *_tests(each), *(each.versions.get(name, "") for name in names)]
        for each in outcomes
        if each.row == WITHOUT
    ]  # fmt: skip
    counted = ("passed", "failed", "skipped")
    tables = [
        _markdown(("Python", "PyTorch", *LIBRARIES, "row", *counted), full),
        _markdown(
            ("Python", "files compiled", "modules imported", "modules that need PyTorch", "registered", *counted,
             "pip would install PyTorch", *LIBRARIES),
            without,
        ),
    ]  # fmt: skip
    return "\n".join(each for each in tables if each)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, or nothing if it has no rows."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows)) if rows else ""


def _tests(outcome: Outcome) -> list[str]:
    """Return the cells of passed, failed and skipped, or why there are none."""
    if outcome.error:
        return [f"not run: {outcome.error}", "", ""]
    return [f"{outcome.tests[result]:,}" for result in ("passed", "failed", "skipped")]


def text(outcomes: Sequence[Outcome]) -> str:
    """Return tables, when each row was run, of which commit, and what failed."""
    lines = [f"python -m experiments.compatibility\n\n{table(outcomes)}"]
    for each in outcomes:
        lines.append(f"{each.versions['python']} {each.row}: {each.date}, commit {each.commit}")
        lines += [f"  failed: {name}" for name in each.failures]
    return "\n".join(lines) + "\n"
