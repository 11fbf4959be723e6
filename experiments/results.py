"""The directory of an evaluation: what it is of, its rows, and what was answered; a second call goes on there.

OUT/config.json     arguments, fingerprints of the LLM and of learned policies, commit
OUT/results.json    a row per policy, trace, seed and budget, of finished batches only
OUT/answers.jsonl   what was generated or chosen, where answers are
"""

from __future__ import annotations

import hashlib
import json
import math
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

PATIENCE = 20
"""How many times as long as a write takes is waited before the next."""

CONFIG, RESULTS, ANSWERS = "config.json", "results.json", "answers.jsonl"


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
        If the directory holds an evaluation on other terms, or something that isn't one.
    """

    def __init__(self, directory: Path, terms: Mapping[str, Any]) -> None:
        self.directory = directory
        self._terms: dict[str, Any] = json.loads(json.dumps(terms, default=str))
        self.rows: list[Row] = []
        self._answers: list[dict[str, Any]] = []
        self._wrote, self._took = -math.inf, 0.0
        if (directory / RESULTS).exists():
            self._refuse_others()
            self.rows = read_rows(directory / RESULTS)
            self._answers = self._read_answers()

    def missing(self, name: str, ids: Iterable[int], rows: int) -> list[int]:
        """Return which traces of that name don't have so many rows yet."""
        there = Counter(row.trace for row in self.rows if row.traces == name)
        return [trace for trace in ids if there[trace] < rows]

    def add(self, batch: Iterable[Row | Answer]) -> None:
        """Take in rows, or answers with theirs, and write them now or, if that would take much of the time, later."""
        for one in batch:
            if isinstance(one, Row):
                self.rows.append(one)
                continue
            self.rows.append(one.row)
            named = {name: getattr(one.row, name) for name in ("traces", "trace", "policy", "budget", "seed", "score")}
            self._answers.append(
                {**named, "example": one.example, "text": one.text, "references": list(one.references)}
            )
        if time.monotonic() - self._wrote >= PATIENCE * self._took:
            self.write()

    def write(self) -> None:
        """Write everything taken in so far: the rows last, so that what they are about is there."""
        began = time.monotonic()
        if not (self.directory / CONFIG).exists():
            config = {"terms": self._terms, "commit": commit()}
            write_atomic(self.directory / CONFIG, json.dumps(config, indent=2) + "\n")
        if self._answers:
            write_atomic(self.directory / ANSWERS, "".join(json.dumps(line) + "\n" for line in self._answers))
        write_rows(self.rows, self.directory / RESULTS)
        self._wrote = time.monotonic()
        self._took = self._wrote - began

    def _refuse_others(self) -> None:
        """Refuse to go on with an evaluation on other terms."""
        path = self.directory / CONFIG
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))["terms"]
        except FileNotFoundError:
            raise ValueError(
                f"{self.directory} has results, but no {CONFIG} that says of what: choose another --out"
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the configuration of an evaluation: {error}") from error
        for name, (was, now) in changed(saved, self._terms).items():
            raise ValueError(
                f"{self.directory} holds an evaluation with {name} {was}, not {now}: choose another --out, or delete it"
            )

    def _read_answers(self) -> list[dict[str, Any]]:
        """Return the answers whose rows are there; what was killed between the two files left more."""
        path = self.directory / ANSWERS
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        rows = {(row.traces, row.trace) for row in self.rows}
        answers = [json.loads(line) for line in lines if line]
        return [answer for answer in answers if (answer["traces"], answer["trace"]) in rows]


def digest(directory: Path) -> str:
    """Return the SHA-256 of the files in a directory, by name."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


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
