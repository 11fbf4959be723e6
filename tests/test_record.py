"""The command `record`: says its size, resumes, refuses what can't be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments import cli, record
from kvenv.store import StoreWriter, TraceStore

OPTIONS = "--traces recall+tracking --trace-length 96 --batch-size 2".split()


def test_a_killed_recording_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    record.main([*OPTIONS, "--num-traces", "5", "--out", str(whole)])
    added, write = [], StoreWriter.write

    def die_at_the_second(self: StoreWriter, *shard: Any) -> None:
        if added:
            raise KeyboardInterrupt
        added.append(shard)
        write(self, *shard)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            record.main([*OPTIONS, "--num-traces", "5", "--out", str(killed)])
    assert len(TraceStore(killed)) == 2
    capsys.readouterr()
    record.main([*OPTIONS, "--num-traces", "5", "--out", str(killed)])
    assert "5 traces of at most 96 tokens" in capsys.readouterr().out
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (killed / path.name).read_bytes(), path.name
    names = [trace.name for trace in TraceStore(killed)]
    assert names == ["recall/train/0", "tracking/train/0", "recall/train/1", "tracking/train/1", "recall/train/2"]


def test_the_size_is_said_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []

    class Stop(Exception):
        pass

    def stop(*args: object) -> None:
        said.append(capsys.readouterr().out)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "record", stop)
        with pytest.raises(Stop):
            record.main([*OPTIONS, "--num-traces", "3", "--out", str(tmp_path / "new")])
    assert "at most 0.8 MB; 0 are there, 0.8 MB to go" in said[0]
    assert not (tmp_path / "new").exists()


def test_a_finished_store_is_left_alone(tmp_path: Path) -> None:
    command = [*OPTIONS, "--num-traces", "2", "--out", str(tmp_path / "store")]
    record.main(command)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    record.main(command)
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-traces", "0"], "num_traces 0"),
        (["--batch-size", "0"], "batch_size 0"),
        (["--first-trace", "-1"], "first_trace -1"),
        (["--trace-length", "5000"], "exceeds the 4096 positions"),
        (["--interval", "200"], "with interval 200 a cut"),
        (["--traces", "nothing"], "unknown traces 'nothing'"),
        (["--num-traces", "1000000000"], "don't fit on the disk"),
    ],
)
def test_errors_are_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KVENV_TRACEBACK", raising=False)
    command = ["record", *OPTIONS, "--num-traces", "2", "--out", str(tmp_path / "store"), *options]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]


def test_help_names_all_kinds_of_traces(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        record.main(["--help"])
    assert "hf:" in capsys.readouterr().out
