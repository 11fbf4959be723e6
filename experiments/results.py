"""The directory of an evaluation: what it is of, its rows, and what was answered; a second call goes on there.

OUT/config.json     arguments, digests of the LLM, of learned policies and of local data, commit
OUT/rows.jsonl      while it runs: a line per finished batch, with its rows and answers, on disk before the next begins
OUT/results.json    at the end, or when it was interrupted: a row per policy, trace, seed and budget
OUT/answers.jsonl   then, too: what was generated or chosen, where answers are

What was killed left rows.jsonl, from which the next call makes the other two.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any

from experiments.runs import changed, commit
from kvenv.answering import Answer
from kvenv.evaluation import Row
from kvenv.files import append_line, digest, read_json, read_lines, write_atomic
from kvenv.lock import hold
from kvenv.tasks.records import check_fields, read_file

CONFIG, ROWS, RESULTS, ANSWERS = "config.json", "rows.jsonl", "results.json", "answers.jsonl"
KEY = ("traces", "trace", "policy", "budget", "seed")
"""What tells a row from the others of an evaluation, and finds its answer."""
KINDS: dict[str, tuple[type, ...]] = {
    field.name: {
        "str": (str,),
        "int": (int,),
        "int | None": (int, NoneType),
        "bool | None": (bool, NoneType),
        "float | None": (float, int, NoneType),
        "Sequence[float] | None": (list, NoneType),
    }[str(field.type)]
    for field in fields(Row)
}
"""What a row's fields are in JSON."""
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
        self._refuse_others()
        if (directory / RESULTS).exists():
            self.rows = read_rows(directory / RESULTS)
            self._answers = self._read_answers()
        self._take_in_journal()

    def missing(self, name: str, ids: Iterable[int], rows: int) -> list[int]:
        """Return which traces of that name don't have just so many rows; what there is of them is forgotten."""
        there = Counter(row.trace for row in self.rows if row.traces == name)
        missing = [trace for trace in ids if there[trace] != rows]
        forgotten = {(name, trace) for trace in missing}
        self.rows = [row for row in self.rows if (row.traces, row.trace) not in forgotten]
        self._answers = [line for line in self._answers if (line["traces"], line["trace"]) not in forgotten]
        return missing

    def add(self, batch: Iterable[Row | Answer]) -> None:
        """Take in rows, or answers with theirs: all of them are on disk when this returns, or none."""
        batch = list(batch)
        rows = [one if isinstance(one, Row) else one.row for one in batch]
        answers = [_line(one) for one in batch if not isinstance(one, Row)]
        if not any((self.directory / name).exists() for name in (ROWS, RESULTS)):
            config = {"terms": self._terms, "commit": commit()}
            write_atomic(self.directory / CONFIG, json.dumps(config, indent=2) + "\n")
        # At once, for who is interrupted writes what is there; answers first, since one without its row is dropped.
        self._answers += answers
        self.rows += rows
        append_line(self.directory / ROWS, {"rows": [asdict(row) for row in rows], "answers": answers})

    def write(self) -> None:
        """Put everything taken in so far into its files: the rows after what they are about, then the journal goes."""
        if self._answers:
            write_atomic(self.directory / ANSWERS, "".join(json.dumps(line) + "\n" for line in self._answers))
        write_rows(self.rows, self.directory / RESULTS)
        (self.directory / ROWS).unlink(missing_ok=True)

    def _refuse_others(self) -> None:
        """Refuse a directory with an evaluation on other terms, or with something else."""
        path = self.directory / CONFIG
        if not path.exists():
            for name in (RESULTS, ANSWERS, ROWS):
                if (self.directory / name).exists():
                    raise ValueError(
                        f"{self.directory} has {name}, but no {CONFIG} that says of what: choose another --out"
                    )
            return
        config = read_json(path, "the configuration of an evaluation")
        saved = config.get("terms") if isinstance(config, dict) else None
        if not isinstance(saved, dict):
            raise ValueError(f"{path} is not the configuration of an evaluation: choose another --out")
        for name, (was, now) in changed(saved, self._terms).items():
            raise ValueError(
                f"{self.directory} holds an evaluation with {name} {was}, not {now}: choose another --out, or delete it"
            )

    def _take_in_journal(self) -> None:
        """Take in what a killed evaluation finished; of what was killed while it put that into its files, once."""
        path = self.directory / ROWS
        rows: dict[tuple[Any, ...], Row] = {}
        answers: dict[tuple[Any, ...], dict[str, Any]] = {}
        for number, batch in enumerate(read_lines(path), start=1):
            place = f"{path}:{number}"
            check_fields(batch, ("rows", "answers"), place)
            rows |= {_key(asdict(row)): row for row in rows_of(batch["rows"], place)}
            for line in batch["answers"]:
                _check_answer(line, place)
                answers[_key(line)] = line
        self.rows = [row for row in self.rows if _key(asdict(row)) not in rows] + [*rows.values()]
        self._answers = [line for line in self._answers if _key(line) not in rows] + [*answers.values()]

    def _read_answers(self) -> list[dict[str, Any]]:
        """Return the answers whose rows are there; what was killed between the two files left more, never fewer."""
        path = self.directory / ANSWERS
        lines = read_file(path) if path.exists() else []
        for number, line in enumerate(lines, start=1):
            _check_answer(line, f"{path}:{number}")
        answered = {_key(asdict(row)) for row in self.rows if row.score is not None}
        if lacking := answered - {_key(line) for line in lines}:
            raise ValueError(
                f"{path} lacks the answers of {len(lacking)} rows of {RESULTS}: put it back, or choose another --out"
            )
        return [line for line in lines if _key(line) in answered]


@contextmanager
def writing(directory: Path, terms: Mapping[str, Any]) -> Iterator[Results]:
    """Let an evaluation take in rows; when it ends or is interrupted, the directory holds its results.json.

    Raises
    ------
    ValueError
        As :class:`Results`, or if another process writes there.
    """
    with hold(directory):
        results = Results(directory, terms)
        try:
            yield results
        finally:
            if results.rows:
                results.write()


def _check_answer(line: Any, place: str) -> None:
    """Refuse what is no answer."""
    check_fields(line, (*KEY, "score", *SAID), place)
    for name in KEY:
        if type(line[name]) not in KINDS[name]:
            raise ValueError(f"{place}: {name} {line[name]!r} is none")


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
    return rows_of(read_json(path, "a results.json"), path)


def rows_of(values: Any, place: object) -> list[Row]:
    """Return the rows that JSON says.

    Raises
    ------
    ValueError
        If it says something else, with the place.
    """
    try:
        if not isinstance(values, list):
            raise TypeError(f"{type(values).__name__} where a list was expected")
        return [_row(value) for value in values]
    except TypeError as error:
        raise ValueError(f"{place} is not a results.json: {error}") from error


def _row(values: Any) -> Row:
    """Return the row that JSON says.

    Raises
    ------
    TypeError
        If it says something else.
    """
    row = Row(**values)
    for name, kinds in KINDS.items():
        value = getattr(row, name)
        if type(value) not in kinds:
            raise TypeError(f"{name} {value!r} of a row, where {' or '.join(kind.__name__ for kind in kinds)} is right")
    return row
