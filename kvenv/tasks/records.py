"""Records of a data set: from a local file, or downloaded by the ``datasets`` package."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from kvenv.files import parse_line
from kvenv.tasks.base import Examples, TaskSetting
from kvenv.traces.draw import Draw

E = TypeVar("E")
Record = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where the records of a data set come from.

    Attributes
    ----------
    file : str
        Name of a local file, JSON lines or a JSON list, in the directory of the data.
    hub : str
        Hugging Face id of the data set that holds the same.
    fields : tuple of str
        What every record must have.
    config : str or None
        Configuration of the data set.
    split : str
        Its split.
    """

    file: str
    hub: str
    fields: tuple[str, ...]
    config: str | None = None
    split: str = "test"

    def read(self, data: Path | None) -> list[Record]:
        """Return the records, from the file if a directory is given.

        Raises
        ------
        FileNotFoundError
            If the directory lacks the file.
        ValueError
            If the file is malformed, holds nothing or lacks a field, or the data set can't be had.
        """
        place = self.place(data)
        records = read_file(data / self.file) if data else self.download()
        if not records:
            raise ValueError(f"{place} holds no record")
        for number, record in enumerate(records, start=1):
            check_fields(record, self.fields, f"{place}:{number}")
        return records

    def place(self, data: Path | None) -> str:
        """Return what errors call it: the file if a directory is given, else the data set."""
        return str(data / self.file) if data else self.hub

    def download(self) -> list[Record]:
        """Return the records of the data set.

        Raises
        ------
        ValueError
            If it can't be had.
        """
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                f"{self.hub} needs the optional package datasets (pip install 'kvenv[tasks]'), or a directory with "
                f"{self.file} (--task-data)"
            ) from error
        try:
            return [dict(record) for record in datasets.load_dataset(self.hub, self.config, split=self.split)]
        except Exception as error:  # the library raises many kinds; all of them mean that it can't be had
            raise self.unavailable(error) from error

    def unavailable(self, error: Exception) -> ValueError:
        """Return the error that says why the data set can't be had and what would do instead."""
        reason = " ".join(str(error).split())
        return ValueError(
            f"data set {self.hub!r} can't be loaded ({reason}): give a directory with {self.file} (--task-data)"
        )


class Records:
    """Records of a data set, read when they are first asked for.

    They are taken in an order drawn once for each data set, since some are sorted, MMLU by subject. The i-th is the
    same however many the setting wants.

    Parameters
    ----------
    source : Source
        Where they come from.
    setting : TaskSetting
        Says how many are wanted, and the directory of the data.
    """

    def __init__(self, source: Source, setting: TaskSetting) -> None:
        self._source, self._setting = source, setting

    @cached_property
    def taken(self) -> list[tuple[int, Record]]:
        """The records that are wanted, in the order drawn, with their numbers in the data set."""
        records = self._source.read(self._setting.data)
        count = min(self._setting.num_examples, len(records))
        order = Draw("records", self._source.hub, self._source.config).some(range(len(records)), count)
        return [(number, records[number]) for number in order]

    def examples(self, make: Callable[[int, Record], E]) -> Examples[E]:
        """Return an example for each record, made of its number and itself.

        A record of another form than ``make`` expects (AttributeError, LookupError, TypeError) is a ValueError that
        names it.
        """

        def made(index: int) -> E:
            number, record = self.taken[index]
            try:
                return make(number, record)
            except (AttributeError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{self._source.place(self._setting.data)}:{number + 1}: a record unlike those of "
                    f"{self._source.hub} ({type(error).__name__}: {error})"
                ) from error

        return Examples(lambda: len(self.taken), made)


def read_file(path: Path) -> list[Record]:
    """Return the records of a JSON list or of JSON lines.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is malformed; the message names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the data lack {path}") from error
    return parse(text, str(path))


def parse(text: str, place: str) -> list[Record]:
    """Return the records of a text, a JSON list or JSON lines.

    Raises
    ------
    ValueError
        If it is malformed; the message names place and line.
    """
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # a number of too many digits, too deep
            raise ValueError(f"{place}:1: not JSON ({error})") from error
    # Not splitlines: a JSON string may hold other line separators, such as U+2028.
    lines = enumerate(text.split("\n"), start=1)
    records = [parse_line(line, f"{place}:{number}") for number, line in lines if line.strip()]
    return records


def check_fields(record: Any, fields: Sequence[str], place: str) -> None:
    """Refuse a record that lacks a field.

    Raises
    ------
    ValueError
        Naming the place, what is missing and what is there.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{place}: {type(record).__name__} where an object was expected")
    missing = [field for field in fields if record.get(field) is None]
    if missing:
        raise ValueError(f"{place}: lacks {', '.join(missing)}; it has {', '.join(map(str, record)) or 'nothing'}")


def strings(record: Record, field: str) -> tuple[str, ...]:
    """Return a field that is a list of strings.

    Raises
    ------
    TypeError
        If it is not.
    """
    value = record[field]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{field} must be a list of strings")
    return tuple(value)
