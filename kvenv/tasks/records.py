"""Records of a data set: from a local file, or downloaded by the ``datasets`` package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        place, records = (str(data / self.file), read_file(data / self.file)) if data else (self.hub, self._download())
        if not records:
            raise ValueError(f"{place} holds no record")
        for number, record in enumerate(records, start=1):
            check_fields(record, self.fields, f"{place}:{number}")
        return records

    def _download(self) -> list[Record]:
        """Return the records of the data set."""
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
            raise ValueError(
                f"data set {self.hub!r} can't be loaded ({' '.join(str(error).split())}): give a directory with "
                f"{self.file} (--task-data)"
            ) from error


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
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    records = []
    # Not splitlines: a JSON string may hold other line separators, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from error
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
