"""Files are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvenv.files import write_atomic


@pytest.mark.parametrize("data", ["zwölf\n", b"\x00\xff", ""])
def test_writes_the_whole_content_into_new_directories(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_replaces_and_is_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
