"""The directory of an evaluation: what it is of, its rows, and what was answered; a second call goes on there.

OUT/config.json     arguments, digests of the LLM, of learned policies and of local data, commit
OUT/results.json    a row per policy, trace, seed and budget, of finished batches only
OUT/answers.jsonl   what was generated or chosen, where answers are
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.runs import changed, commit
from kvenv.answering import Answer
from kvenv.evaluation import Row
from kvenv.files import write_atomic
from kvenv.tasks.records import check_fields, read_file

PATIENCE = 20
"""How many times as long as a write takes is waited before the next."""

CONFIG, RESULTS, ANSWERS = "config.json", "results.json", "answers.jsonl"
KEY = ("traces", "trace", "policy", "budget", "seed")
"""What tells a row from the others of an evaluation, and finds its answer."""
SAID = ("example", "text", "references")
"""What an answer says besides its row's key and score."""


class Results:
    """The rows of an evaluation, in a directory.

    Parameters
    ----------
    directory : Path
        Where; nothing is written before there are rows.
    terms : mapping
        What all rows depend on, JSON-able.

    Attributes
    ----------
    rows : list of Row
        Those there.

    Raises
    ------
    ValueError
        If the directory holds an evaluation on other terms, something that isn't one, or one that is damaged.
    """

    def __init__(self, directory: Path, terms: Mapping[str, Any]) -> None:
        self.directory = directory
        self._terms: dict[str, Any] = json.loads(json.dumps(terms, default=str))
        self.rows: list[Row] = []
        self._answers: list[dict[str, Any]] = []
        self._wrote, self._took = -math.inf, 0.0
        self._refuse_others()
        if (directory / RESULTS).exists():
            self.rows = read_rows(directory / RESULTS)
            self._answers = self._read_answers()

    def missing(self, name: str, ids: Iterable[int], rows: int) -> list[int]:
        """Return which traces of that name don't have just so many rows; what there is of them is forgotten."""
        there = Counter(row.trace for row in self.rows if row.traces == name)
        missing = [trace for trace in ids if there[trace] != rows]
        forgotten = {(name, trace) for trace in missing}
        self.rows = [row for row in self.rows if (row.traces, row.trace) not in forgotten]
        self._answers = [line for line in self._answers if (line["traces"], line["trace"]) not in forgotten]
        return missing

    def add(self, batch: Iterable[Row | Answer]) -> None:
        """Take in rows, or answers with theirs, and write them now or, if that would take much of the time, later."""
        batch = list(batch)
        rows = [one if isinstance(one, Row) else one.row for one in batch]
        answers = [_line(one) for one in batch if not isinstance(one, Row)]
        # At once, for who is interrupted writes what is there; answers first, since one without its row is dropped.
        self._answers += answers
        self.rows += rows
        if time.monotonic() - self._wrote >= PATIENCE * self._took:
            self.write()

    def write(self) -> None:
        """Write everything taken in so far: the rows last, so that what they are about is there."""
        began = time.monotonic()
        if not (self.directory / RESULTS).exists():
            config = {"terms": self._terms, "commit": commit()}
            write_atomic(self.directory / CONFIG, json.dumps(config, indent=2) + "\n")
        if self._answers:
            write_atomic(self.directory / ANSWERS, "".join(json.dumps(line) + "\n" for line in self._answers))
        write_rows(self.rows, self.directory / RESULTS)
        self._wrote = time.monotonic()
        self._took = self._wrote - began

    def _refuse_others(self) -> None:
        """Refuse a directory with an evaluation on other terms, or with something else."""
        path = self.directory / CONFIG
        if not path.exists():
            for name in (RESULTS, ANSWERS):
                if (self.directory / name).exists():
                    raise ValueError(
                        f"{self.directory} has {name}, but no {CONFIG} that says of what: choose another --out"
                    )
            return
        config = _read_json(path, "the configuration of an evaluation")
        saved = config.get("terms") if isinstance(config, dict) else None
        if not isinstance(saved, dict):
            raise ValueError(f"{path} is not the configuration of an evaluation: choose another --out")
        for name, (was, now) in changed(saved, self._terms).items():
            raise ValueError(
                f"{self.directory} holds an evaluation with {name} {was}, not {now}: choose another --out, or delete it"
            )

    def _read_answers(self) -> list[dict[str, Any]]:
        """Return the answers whose rows are there; what was killed between the two files left more, never fewer."""
        path = self.directory / ANSWERS
        lines = read_file(path) if path.exists() else []
        for number, line in enumerate(lines, start=1):
            check_fields(line, (*KEY, "score", *SAID), f"{path}:{number}")
        answered = {_key(asdict(row)) for row in self.rows if row.score is not None}
        if lacking := answered - {_key(line) for line in lines}:
            raise ValueError(
                f"{path} lacks the answers of {len(lacking)} rows of {RESULTS}: put it back, or choose another --out"
            )
        return [line for line in lines if _key(line) in answered]


def _key(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what is common to a row and its answer, and to no other."""
    return tuple(values[name] for name in KEY)


def _line(answer: Answer) -> dict[str, Any]:
    """Return an answer as it is written."""
    row = {name: getattr(answer.row, name) for name in (*KEY, "score")}
    return row | {name: getattr(answer, name) for name in SAID}


def named(name: str, path: Path) -> str:
    """Return a name with the digest of what it is the name of."""
    return f"{name} ({digest(path)[:12]})"


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the files in a directory, by name."""
    digested = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.iterdir() if file.is_file()):
            digested.update(os.fsencode(file.name) + b"\0" + bytes.fromhex(digest(file)))
        return digested.hexdigest()
    with path.open("rb") as opened:
        while part := opened.read(1 << 20):  # data of gigabytes are never held whole
            digested.update(part)
    return digested.hexdigest()


def _read_json(path: Path, what: str) -> Any:
    """Return what a file holds that should be ``what``."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not {what}: {error}") from error


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
    rows = _read_json(path, "a results.json")
    try:
        if not isinstance(rows, list):
            raise TypeError(f"{type(rows).__name__} where a list was expected")
        return [Row(**row) for row in rows]
    except TypeError as error:
        raise ValueError(f"{path} is not a results.json: {error}") from error
