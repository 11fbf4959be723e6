"""A paper's elements beside ours, as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import experiments
from experiments.comparison import RESAMPLES, Estimate, estimate, weights
from experiments.reproduce.figures import SOURCES, Figure
from experiments.reproduce.study import Study
from experiments.runs import commit
from experiments.tables import wide_console
from kvenv.files import write_atomic

S = TypeVar("S", bound=Study[Any])
RESULTS = Path(experiments.__file__).parent / "results"
SAME, NOT, NONE = "same direction", "not", "no counterpart"
"""Verdicts; what follows a colon says more."""


@dataclass(frozen=True)
class Line:
    """One figure of the paper beside ours.

    Attributes
    ----------
    what, paper, ours : str
        What it is of, and the two, ours with its 95 % interval.
    verdict : str
        One of the verdicts.
    """

    what: str
    paper: str
    ours: str
    verdict: str


@dataclass(frozen=True)
class Element:
    """Something that the paper reports, beside ours.

    Attributes
    ----------
    name : str
        Heading.
    figure : Figure
        What the paper reports.
    ours : str
        Our setting.
    command : str
        What measured it.
    lines : list of Line
        The figures.
    note : str
        What they don't say.
    """

    name: str
    figure: Figure
    ours: str
    command: str
    lines: list[Line]
    note: str = ""


@dataclass(frozen=True)
class OnGPU:
    """Something that takes a real model and a GPU.

    Attributes
    ----------
    name, figure : str, Figure
        What the paper reports.
    commands : list of str
        What measures it.
    """

    name: str
    figure: Figure
    commands: list[str]


@dataclass(frozen=True)
class Page:
    """All of it.

    Attributes
    ----------
    title, about : str
        Heading, and what it rests on.
    elements, on_gpu : list
        What was measured, and what wasn't.
    """

    title: str
    about: str
    elements: list[Element]
    on_gpu: list[OnGPU]

    def markdown(self, made: dict[str, Any]) -> str:
        """Return the page; ``made`` says by which command, when and how (:func:`made_by`)."""
        claims = committed("claims")
        # Of five trainings' commits the first digits are enough.
        trained_at = ", ".join(one[:8] + one[40:] for one in made["trained_at"])
        sources = "; ".join(f"[{tag}] {says}" for tag, says in SOURCES.items())
        lines = [
            f"# {self.title}",
            "",
            f"`{made['command']}`, {made['date']}, commit {made['commit']}, trained at {trained_at}. {self.about} What "
            f"`{claims['command']}` measured is of {claims['date']}, commit {claims['commit']}.",
            "",
            f"How a paper's figure is known: {sources}.",
            "",
            "| element | same direction | not | no counterpart |",
            "| --- | --- | --- | --- |",
        ]
        for element in self.elements:
            counts = [
                sum(line.verdict.split(":")[0] == verdict for line in element.lines) for verdict in (SAME, NOT, NONE)
            ]
            lines.append(f"| {element.name} | {' | '.join(map(str, counts))} |")
        for element in self.elements:
            lines += ["", f"## {element.name}", "", f"The paper: {element.figure}", ""]
            lines += [f"Ours: {element.ours} `{element.command}`", "", "| of | the paper | ours | verdict |"]
            lines += ["| --- | --- | --- | --- |"]
            lines += [f"| {line.what} | {line.paper} | {line.ours} | {line.verdict} |" for line in element.lines]
            lines += ["", element.note] if element.note else []
        lines += ["", "## What needs a real model and a GPU", "", "Not measured here. What would measure it:"]
        for row in self.on_gpu:
            lines += ["", f"**{row.name}.** The paper: {row.figure}", "", "```bash", *row.commands, "```"]
        return "\n".join(lines) + "\n"

    def write(self, name: str, out: Path, made: dict[str, Any], *, ship: bool) -> list[Path]:
        """Write ``name.md`` and ``name.json`` to a directory, and to the results of this checkout if it ships."""
        directories = [out, RESULTS] if ship else [out]
        for directory in directories:
            write_atomic(directory / f"{name}.md", self.markdown(made))
            write_atomic(directory / f"{name}.json", json.dumps({**made, **asdict(self)}, indent=1) + "\n")
        return [directory / f"{name}.md" for directory in directories]


def made_by(command: str, **terms: Any) -> dict[str, Any]:
    """Return how a page was made: command, date, commit and ``terms``."""
    return {"command": command, "date": datetime.now(timezone.utc).date().isoformat(), "commit": commit(), **terms}


def publish(name: str, study: S, page: Callable[[S], Page], args: Any, command: str) -> None:
    """Do what a study hasn't done, and write its page; ``command`` is what it says that it was made with."""
    study.carry_out(args.processes)
    made = made_by(command, trained_at=study.commits(), size=study.terms(), minutes=sum(study.times().values()) / 60)
    for path in page(study).write(name, args.out, made, ship=args.ship):
        wide_console().print(f"page: {path}", soft_wrap=True)


def committed(name: str) -> dict[str, Any]:
    """Return the numbers of one of the committed results."""
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def committed_claims() -> tuple[dict[str, dict[str, Any]], str]:
    """Return the committed claims by name, and the command that made them."""
    found = committed("claims")
    return {claim["name"]: claim for claim in found["claims"]}, found["command"]


def claimed_means() -> dict[str, dict[str, float]]:
    """Return the claims' mean answer losses, by policy and cell ("recall 32"), those that were measured."""
    table = committed_claims()[0]["Answer loss"]
    cells = table["headings"][1:]
    return {
        policy: {cell: float(loss) for cell, loss in zip(cells, losses) if loss != "-"}
        for policy, *losses in table["table"]
    }


def ratio(above: np.ndarray, below: np.ndarray) -> Estimate:
    """Return the ratio of two means over the same traces (traces,), with its bootstrap interval."""
    chosen = weights(np.random.default_rng(0), RESAMPLES, len(above))
    return estimate(float(above.mean() / below.mean()), (chosen @ above) / (chosen @ below))


def shown(of: Estimate, form: str = ".3f") -> str:
    """Return an estimate with its 95 % interval."""
    return f"{of.mean:{form}} [{of.low:{form}}, {of.high:{form}}]"


def direction(change: Estimate, expected: int) -> str:
    """Return whether a change has the sign expected, its interval excluding 0."""
    if change.low <= 0 <= change.high:
        return f"{NOT}: no difference found"
    return SAME if np.sign(change.mean) == expected else f"{NOT}: the opposite"
