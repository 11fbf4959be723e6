"""One writer per directory, whoever it is and however it ends; readers don't wait."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from experiments import cli
from kvenv.files import ASIDE
from kvenv.lock import LOCK, hold
from tests.faults import fails, small_disk
from tests.killing import Counter
from tests.test_disks import EVALUATE, RECORD, TRAIN
from tests.test_report import make


def test_nobody_else_gets_in_and_afterwards_everybody(tmp_path: Path) -> None:
    with hold(tmp_path):
        with pytest.raises(ValueError) as refused, hold(tmp_path):
            pytest.fail("two hold it")
        assert str(refused.value) == (
            f"{tmp_path} is being written by process {os.getpid()} on {platform.node()}: wait until it ends, or choose "
            "another directory"
        )
        with hold(tmp_path / "below"):
            (tmp_path / "below" / "file").write_text("")
    with hold(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["below"]


def test_it_leaves_no_directory_that_it_made_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), hold(tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()
    with hold(tmp_path / "used"):
        (tmp_path / "used" / "file").write_text("")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    with hold(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()


def test_a_directory_that_was_deleted_meanwhile_is_no_error_and_its_next_holder_keeps_it(tmp_path: Path) -> None:
    for made_before in (False, True):
        if made_before:
            (tmp_path / "run").mkdir()
        with hold(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with ExitStack() as second:
        with hold(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run")
            second.enter_context(hold(tmp_path / "run"))
        with pytest.raises(ValueError, match="is being written"), hold(tmp_path / "run"):
            pytest.fail("two hold it")


def test_what_killed_writers_left_aside_goes(tmp_path: Path) -> None:
    for name in (f".index.json.abc{ASIDE}", ".hidden", f"mine{ASIDE}", ".download.partial"):
        (tmp_path / name).write_text("")
    with hold(tmp_path):
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".download.partial", ".hidden", LOCK, f"mine{ASIDE}"]


def test_a_lock_that_was_given_back_between_opening_and_locking_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, locked = fcntl.flock, []

    def given_back_first(descriptor: int, operation: int) -> None:
        if not locked:
            (tmp_path / LOCK).unlink()
        locked.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", given_back_first)
    with hold(tmp_path):
        assert len(locked) == 2
        monkeypatch.undo()
        with pytest.raises(ValueError, match="is being written"), hold(tmp_path):
            pytest.fail("two hold it")


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        pytest.warns(UserWarning, match=r"can't be locked \(No locks available\): see that nobody else w"),
        hold(tmp_path),
    ):
        pass


def test_without_locks_as_on_windows_directories_are_made_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvenv.lock.fcntl", None)
    with hold(tmp_path / "out"):
        assert not list((tmp_path / "out").iterdir())


def test_a_lock_that_finds_no_room_is_named() -> None:
    with small_disk(64) as disk:
        (disk / "ballast").write_bytes(bytes(64 * 1024))
        with pytest.raises(OSError, match=rf"No space left on device: '{disk / LOCK}'"), hold(disk):
            pytest.fail("there was room")


@pytest.mark.parametrize(
    "command", [EVALUATE, RECORD, TRAIN, ["reproduce", "kvp"]], ids=lambda command: " ".join(command[:2])
)
def test_a_second_command_is_refused_in_a_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hold(tmp_path):
        error = fails(capsys, [*command, "--out", str(tmp_path)])
    assert f"{tmp_path} is being written by process {os.getpid()}" in error
    assert not list(tmp_path.iterdir())


def test_readers_read_what_is_being_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run", updates=2, torn=True)
    Counter().policy.save_pretrained(run / "policy")
    with hold(run):
        cli.main(["report", str(run), "--out", str(tmp_path / "report")])
        assert "2 of 4" in (tmp_path / "report/report.md").read_text()
