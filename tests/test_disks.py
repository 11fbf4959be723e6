"""Full and read-only disks: one line, exit code 2, what was there is there still, and it goes on when there is room."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from agents.checkpoint import load_checkpoint, save_checkpoint
from experiments import cli
from experiments.results import ANSWERS, RESULTS, ROWS, Results, read_rows, writing
from experiments.runs import read_metrics
from kvenv.files import ASIDE
from kvenv.store import TraceStore
from tests.faults import fails, files_of_at_most, read_only, small_disk
from tests.killing import TERMS, answers, policy, state

EVALUATE = [
    *"evaluate --traces recall --trace-length 96 --num-traces 3 --budgets 24 --batch-size 1".split(),
    *"--policies random".split(),
]
RECORD = "record --traces recall --trace-length 96 --num-traces 4 --batch-size 2".split()
TRAIN = [
    *"train imitation --traces recall --num-traces 1 --trace-length 96 --budgets 32 --hidden 4 --updates 3".split(),
    *"--save-every 1 --eval-every 0".split(),
]  # fmt: skip


def leftovers(directory: Path) -> list[Path]:
    """Return what was not removed of files that couldn't be written."""
    return [path for path in directory.rglob(".*") if path.is_file()]


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that everybody gets to; those above pytest's are root's."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("runs") / "run"
    cli.main([*TRAIN, "--out", str(out)])
    return out


def losses(directory: Path) -> list[tuple[float, float]]:
    """Return what a run measured."""
    return [(line["step"], line["loss/ranking"]) for line in read_metrics(directory)]


@pytest.mark.parametrize("size", [100, 1_000, 4_000, 20_000, 30_000])
def test_a_training_without_room_ends_in_a_line_and_goes_on(
    size: int, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with files_of_at_most(size):
        error = fails(capsys, [*TRAIN, "--out", str(out)])
    assert f"File too large: '{tmp_path}" in error
    assert not leftovers(tmp_path)
    begun = (out / "config.json").exists()
    cli.main(["train", "--resume", str(out)] if begun else [*TRAIN, "--out", str(out)])
    assert losses(out) == losses(trained)
    for name in ("policy.safetensors", "README.md"):
        assert (out / "policy" / name).read_bytes() == (trained / "policy" / name).read_bytes()


@pytest.mark.parametrize("free", [4, 12, pytest.param(40, marks=pytest.mark.slow), 120])
def test_a_full_disk_ends_a_training_in_a_line_and_it_goes_on(
    free: int, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(2048) as disk:
        (disk / "ballast").write_bytes(bytes((2048 - free) * 1024))
        assert "No space left on device: '" in fails(capsys, [*TRAIN, "--out", str(disk / "run")])
        assert not leftovers(disk)
        (disk / "ballast").unlink()
        begun = (disk / "run/config.json").exists()
        cli.main(["train", "--resume", str(disk / "run")] if begun else [*TRAIN, "--out", str(disk / "run")])
        assert losses(disk / "run") == losses(trained)


def test_a_recording_without_room_ends_in_a_line_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cli.main([*RECORD, "--out", str(whole)])
    with files_of_at_most(100_000):
        assert "File too large: '" in (error := fails(capsys, [*RECORD, "--out", str(cut)]))
    assert "shard-00000.safetensors" in error
    assert not cut.exists() or not list(cut.iterdir())
    cli.main([*RECORD, "--out", str(cut)])
    assert (cut / "shard-00001.safetensors").read_bytes() == (whole / "shard-00001.safetensors").read_bytes()
    # The second shard fits, the index that lists it doesn't.
    (cut / "shard-00001.safetensors").unlink()
    index = json.loads((cut / "index.json").read_text())
    del index["shards"][1], index["seal"]
    (cut / "index.json").write_text(json.dumps(index))
    before = (cut / "index.json").read_bytes()
    with small_disk(2048) as disk:
        for file in cut.iterdir():
            (disk / file.name).write_bytes(file.read_bytes())
        shard = (whole / "shard-00001.safetensors").stat().st_size
        used = sum(-(-file.stat().st_size // 4096) * 4 for file in disk.iterdir())
        (disk / "ballast").write_bytes(bytes((2048 - used - 4 * -(-shard // 4096) - 4) * 1024))
        fails(capsys, [*RECORD, "--out", str(disk)])
        assert (disk / "index.json").read_bytes() == before
        assert len(TraceStore(disk)) == 2
        (disk / "ballast").unlink()
        cli.main([*RECORD, "--out", str(disk)])
        assert len(TraceStore(disk)) == 4


def test_an_evaluation_without_room_keeps_its_rows_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cli.main([*EVALUATE, "--out", str(whole)])
    rows = read_rows(whole / RESULTS)
    line = len(json.dumps({"rows": [vars(rows[0])], "answers": []})) + 1
    for size in (200, line + 100):
        with files_of_at_most(size):
            assert "File too large: '" in fails(capsys, [*EVALUATE, "--out", str(cut)])
        assert not leftovers(tmp_path)
    cli.main([*EVALUATE, "--out", str(cut)])
    assert read_rows(cut / RESULTS) == rows
    assert not (cut / ROWS).exists()


@pytest.mark.parametrize("size", range(0, 3_000, 171))
def test_rows_that_found_no_room_are_all_there_or_not_at_all(size: int, tmp_path: Path) -> None:
    taken: list[int] = []

    def take(traces: Iterable[int]) -> None:
        with writing(tmp_path, TERMS) as results:
            for trace in traces:
                results.add(answers(trace))
                taken.append(trace)

    with files_of_at_most(size), pytest.raises(OSError, match="File too large"):
        take(range(10))
    there = len(Results(tmp_path, TERMS).rows) // 2
    assert there >= len(taken)
    take(range(there, 10))
    assert read_rows(tmp_path / RESULTS) == [answer.row for trace in range(10) for answer in answers(trace)]
    assert len((tmp_path / ANSWERS).read_text().splitlines()) == 20


def test_a_checkpoint_without_room_leaves_the_one_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), 1)
    for size in (0, 50, 5_000):
        with files_of_at_most(size), pytest.raises(OSError, match=r"File too large: .*00000002/state\.safetensors'"):
            save_checkpoint(tmp_path, state(2), 2)
        assert load_checkpoint(tmp_path).values["done"] == 1
    assert not list(tmp_path.rglob(f"*{ASIDE}"))


@pytest.mark.parametrize(
    "command",
    [EVALUATE, RECORD, TRAIN, ["headroom"], ["bench"], ["reproduce", "kvp"], ["pretrain"]],
    ids=lambda command: command[0],
)
def test_what_cannot_be_written_is_said_before_anything_is_computed(
    command: list[str], open_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for computes in (
        "agents.imitation.ImitationLearner.update", "kvenv.evaluation.rollout", "experiments.record.record",
        "experiments.bench.__main__.import_module", "experiments.reproduce.study.run_jobs",
        "experiments.pretrain.Pretraining.update",
    ):  # fmt: skip
        monkeypatch.setattr(computes, lambda *_, **__: pytest.fail("it was computed"))
    with read_only(open_path):
        assert "Permission denied: '" in fails(capsys, [*command, "--out", str(open_path / "out")])
        assert "Permission denied: '" in fails(capsys, [*command, "--out", str(open_path)])
    assert not list(open_path.iterdir())
    (open_path / "file").write_text("mine")
    for out in (open_path / "file", open_path / "file" / "out"):
        assert "file" in fails(capsys, [*command, "--out", str(out)])
    assert (open_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoints", "policy"])
def test_a_run_that_could_not_save_does_not_begin(
    name: str, open_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.imitation.ImitationLearner.update", lambda _: pytest.fail("it was trained"))
    out = open_path / "out"
    (out / name).mkdir(parents=True)
    out.chmod(0o777)
    with read_only(out / name):
        assert f"out/{name}" in fails(capsys, [*TRAIN, "--out", str(out)])
    (out / name).rmdir()
    (out / name).write_text("a file")
    assert f"out/{name}" in fails(capsys, ["train", "--resume", str(out)])


def test_a_policy_without_room_leaves_no_half(tmp_path: Path) -> None:
    policy(1).save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        with files_of_at_most(path.stat().st_size - 1), pytest.raises(OSError, match="File too large"):
            policy(2).save_pretrained(tmp_path / path.stem)
        assert not [each for each in (tmp_path / path.stem).iterdir() if each.stat().st_size < 100]
