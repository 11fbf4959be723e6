"""Files are whole or absent."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from kvenv.files import ASIDE, append_line, check_writable, naming, remove_leftovers, write_atomic


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


@pytest.mark.parametrize("write", [write_atomic, append_line])
def test_the_directory_is_synced_after_the_file_got_its_name(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bool, bool]] = []
    fsync, path = os.fsync, tmp_path / "file"

    def noted(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write(path, "text")
    assert synced == [(False, write is append_line), (True, True)]


def test_leftovers_are_those_of_writes_that_were_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), 0))  # nothing is renamed, as if killed before
    write_atomic(tmp_path / "file", "text")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".file.")
    assert left.name.endswith(ASIDE)
    (tmp_path / ".gitignore").write_text("")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".gitignore"]


def test_an_error_of_the_disk_has_a_name_and_others_keep_theirs(tmp_path: Path) -> None:
    def fail(error: OSError) -> None:
        with naming(tmp_path):
            raise error

    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}'"):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left on device: 'mine'"):
        fail(OSError(errno.ENOSPC, "No space left on device", "mine"))
    with pytest.raises(ConnectionRefusedError) as refused:
        fail(OSError(errno.ECONNREFUSED, "Connection refused"))
    assert refused.value.filename is None


def test_what_can_be_written_in_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "below")
    assert not list((tmp_path / "new" / "below").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        check_writable(tmp_path / "file")
