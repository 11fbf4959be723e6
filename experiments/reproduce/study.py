"""What is trained and measured, as jobs whose results stay: the frame of the claims and of the two papers' pages."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from experiments import evaluate, record
from experiments.jobs import Job, read_times, run_jobs
from experiments.learners import LearnerArgs
from experiments.results import read_rows, rows_of, write_rows
from experiments.runs import CONFIG, POLICY, changed, read_config
from experiments.train import train_whole
from kvenv.evaluation import Row
from kvenv.evaluation import evaluate as evaluate_policies
from kvenv.files import append_line, read_json, read_lines, write_atomic
from kvenv.layerwise import Policy
from kvenv.lock import hold
from kvenv.models import load_model
from kvenv.traces import load_traces

FAMILIES = ("recall", "tracking", "dialogue", "reasoning")
S = TypeVar("S")
MEASURED_TOGETHER = 3
"""Policies that a job measures."""


@dataclass(frozen=True)
class Contestant:
    """Who is measured.

    Attributes
    ----------
    name : str
        What rows call it.
    policy : str or callable
        A policy's name, or the directory of a trained one; or what makes it, a function of a module's top level.
    seed : int
        Of its training.
    after : tuple of str
        Jobs that make it.
    """

    name: str
    policy: str | Callable[[], Policy]
    seed: int = 0
    after: tuple[str, ...] = ()

    def make(self, device: str) -> Policy | None:
        """Return the policy, None for the full cache."""
        if callable(self.policy):
            return self.policy()
        return next(iter(evaluate.make_policies((self.policy,), device).values()))


class Study(ABC, Generic[S]):
    """Jobs in a directory: ``runs/``, ``stores/``, ``rows/``, ``done/``, ``times.json``, and ``size.json``.

    Parameters
    ----------
    out : Path
        The directory.
    size : dataclass
        How much is trained and measured.
    """

    def __init__(self, out: Path, size: S) -> None:
        self.out, self.size = out, size

    @abstractmethod
    def jobs(self) -> list[Job]:
        """Return all jobs; what others wait for comes first."""

    @abstractmethod
    def terms(self) -> dict[str, Any]:
        """Return the JSON-able numbers and hyper-parameters that everything is trained and measured with."""

    def begin(self) -> None:
        """Write the terms down, so that a second call goes on with them, or with more seeds.

        Raises
        ------
        ValueError
            If the directory holds what was trained or measured on other terms.
        """
        path, terms = self.out / "size.json", self.terms()
        if not path.exists() and (self.out / "done").exists():
            raise ValueError(f"{self.out} holds results of unknown size: choose another --out")
        begun = read_json(path, "the size of a study") if path.exists() else terms
        for name, (was, now) in changed(begun, terms).items():
            if name != "seeds":
                raise ValueError(f"{name} {now} is not what {self.out} was begun with, {was}: choose another --out")
        write_atomic(path, json.dumps(terms, indent=1) + "\n")

    def carry_out(self, processes: int) -> None:
        """Do what isn't done, ``processes`` jobs at a time."""
        with hold(self.out):
            self.begin()
            run_jobs(self.jobs(), processes, self.out / "times.json")

    def times(self) -> dict[str, float]:
        """Return the seconds of each job so far."""
        return read_times(self.out / "times.json")

    def commits(self) -> list[str]:
        """Return the commits that the trainings were begun at."""
        return sorted({str(read_config(path.parent)["commit"]) for path in (self.out / "runs").glob(f"*/{CONFIG}")})

    def run(self, name: str) -> Path:
        """Return the directory of a training."""
        return self.out / "runs" / name

    def trained(self, name: str, run: str, seed: int = 0) -> Contestant:
        """Return the policy of a training as one that is measured."""
        return Contestant(name, str(self.run(run) / POLICY), seed, (run,))

    def rows(self, where: str) -> list[Row]:
        """Return what was measured somewhere; a row's seed is that of the training."""
        paths = sorted((self.out / "rows").glob(f"{where}-*.json"))
        return [row for path in paths for row in read_rows(path)]

    def measurement(self, where: str, args: evaluate.Args, contestants: Sequence[Contestant]) -> list[Job]:
        """Return jobs that measure some contestants each: what they share, the full cache and golden, is done once."""
        jobs = []
        for start in range(0, len(contestants), MEASURED_TOGETHER):
            group = contestants[start : start + MEASURED_TOGETHER]
            paths = [self.out / "rows" / f"{where}-{one.name}-{one.seed}.json" for one in group]
            name = "-".join([where, *(f"{one.name}-{one.seed}" for one in group)])
            after = tuple(dict.fromkeys(need for one in group for need in one.after))
            jobs.append(self.job(name, measure, args, group, paths, after=after))
        return jobs

    def job(self, name: str, work: Callable[..., None], *arguments: object, after: tuple[str, ...] = ()) -> Job:
        """Return a job, which is told last where to write that it is done."""
        result = self.out / "done" / name
        return Job(name, work, (*arguments, result), result, after)


def record_store(args: record.Args, result: Path) -> None:
    """Record a trace store, or what it lacks."""
    record.record_store(args)
    write_atomic(result, "")


def train_job(args: LearnerArgs, result: Path) -> None:
    """Train, or go on where a training was interrupted."""
    train_whole(args)
    write_atomic(result, "")


def measure(args: evaluate.Args, contestants: Sequence[Contestant], paths: Sequence[Path], result: Path) -> None:
    """Evaluate on all families those who aren't yet, and write their rows under their names and trainings' seeds.

    A batch's rows are on disk, in a file of lines beside the one they will be in, before the next begins.
    """
    todo = {f"{one.name}-{one.seed}": (one, path) for one, path in zip(contestants, paths) if not path.exists()}
    loaded = load_model(args.model)
    policies = {label: one.make(args.device) for label, (one, _) in todo.items()}
    for family in args.traces if todo else ():
        source = load_traces(family, split=args.split, tokenizer=loaded.tokenizer, trace_length=args.trace_length)
        missing = _missing(args, source.name, [path for _, path in todo.values()])
        batches = evaluate_policies(
            policies,
            source,
            missing,
            model=loaded.model,
            budgets=args.budgets,
            seeds=args.seeds,
            score_from=args.score_from,
            batch_size=args.batch_size,
        )
        for batch in batches if missing else ():
            for label, (one, path) in todo.items():
                if rows := [replace(row, policy=one.name, seed=one.seed) for row in batch if row.policy == label]:
                    append_line(_journal(path), [asdict(row) for row in rows])
    for _, path in todo.values():
        write_rows(_measured(path), path)
        _journal(path).unlink(missing_ok=True)
    write_atomic(result, "")


def _journal(path: Path) -> Path:
    """Return where the rows of a file are until all are there."""
    return path.with_suffix(".jsonl")


def _measured(path: Path) -> list[Row]:
    """Return the rows that are there so far, none twice."""
    journal = _journal(path)
    batches = [rows_of(rows, f"{journal}:{number}") for number, rows in enumerate(read_lines(journal), start=1)]
    rows = {(row.traces, row.trace, row.budget): row for batch in batches for row in batch}
    return list(rows.values())


def _missing(args: evaluate.Args, family: str, paths: Sequence[Path]) -> list[int]:
    """Return the traces of a family that not all have been measured on at all budgets."""
    there = Counter(row.trace for path in paths for row in _measured(path) if row.traces == family)
    return [trace for trace in range(args.num_traces) if there[trace] != len(paths) * len(args.budgets)]
