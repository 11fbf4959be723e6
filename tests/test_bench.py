"""What the benchmark makes of its measurements. How long anything takes is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from experiments.bench import SECTIONS, __main__, generate, profile, ranking, step
from experiments.bench.machine import Machine
from experiments.bench.measure import Row, alternate, compare
from experiments.bench.memory import held, peak
from experiments.bench.models import work
from experiments.bench.peer import Peer
from experiments.cli import run
from kvenv import graphs
from kvenv.models import load_model
from tests.models import random_model, random_tokens
from tests.replay import Replay

TIMES = {"ours": np.array([1.0, 2.0, 3.0]), "theirs": np.array([2.0, 4.0, 9.0])}


def test_sides_are_called_in_turn() -> None:
    calls: list[str] = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}


def test_times_and_rates_are_compared_by_medians() -> None:
    times = compare("s", "c", TIMES, "ours", "theirs", target="<= 0.6", floor=0.5)
    assert (times.value, times.baseline, times.ratio, times.unit, times.floor) == (2000, 4000, 0.5, "ms", 500)
    assert times.met is True
    assert times.spread == pytest.approx((0.5 - (1 / 3 + 0.5) / 2) / 2)
    rates = compare("s", "c", TIMES, "ours", "theirs", amount=8, target=">= 2.5")
    assert (rates.value, rates.baseline, rates.ratio, rates.unit) == (4, 2, 2, "tokens/s")
    assert rates.met is False
    assert compare("s", "c", TIMES, "ours", "theirs").met is None
    assert Row("s", "c", "m", 3.0, "GiB", target="<= 2").met is False


def test_the_work_of_a_step_is_counted_in_weights_pairs_and_attention() -> None:
    model = random_model(dtype=torch.float32)
    config = model.config
    head = config.vocab_size * config.hidden_size
    weights = sum(x.numel() for x in model.parameters()) - head * (not config.tie_word_embeddings)
    pairs = 3 * 2 * 2 * 5 * config.head_dim * 2
    scores = 3 * 4 * (5 + 4) * 4 * config.head_dim * 2
    assert work(model, rows=3, tokens=4, filled=5) == (4 * (weights + pairs), 2 * 12 * weights + 4 * scores)


def test_the_floor_is_bytes_or_arithmetic() -> None:
    machine = Machine(bytes_per_second=10.0, flops=100.0)
    assert machine.floor(50, 100) == 5
    assert machine.floor(5, 1000) == 10


def test_the_sides_of_ranking_agree() -> None:
    assert set(ranking.sides(64, "cpu")) == {
        "sample", "sample pick by pick", "log-probability", "quadratic log-probability"
    }  # fmt: skip


def test_the_captured_forward_is_the_bare_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "backend", Replay())
    model, tokens = random_model(), random_tokens(2, 12)
    bare = step.bare_forward(model, tokens, 8, "sdpa")
    captured = step.captured_forward(step.bare_copy(model, "sdpa"), tokens, 8)
    for _ in range(3):
        torch.testing.assert_close(captured(), bare(), rtol=0, atol=0)


def test_captured_steps_are_measured_and_their_capture_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "backend", Replay())
    rows = list(step.captured("tiny", load_model("tiny"), 2, 1e-3, "cpu"))
    expected = ["step, {}, captured / bare forward, captured", "warm-up, {}", "capture, {}"]
    assert [row.metric for row in rows] == [x.format(features) for features in ("kv", "foresight") for x in expected]
    assert all(row.value > 0 and row.unit == "ms" for row in rows)


def allocating(megabytes: int) -> Callable[[], torch.Tensor]:
    """Return a call that takes so much memory, and as much again that it gives back."""
    return lambda: torch.ones(megabytes << 20, dtype=torch.int8) + torch.ones(1, dtype=torch.int8)


def test_peak_memory_counts_the_result_and_what_was_given_back() -> None:
    assert 190 < peak(allocating, 96, device="cpu") / 2**20 < 260
    assert 50 < held("cpu") / 2**20 < 20_000


def section(name: str, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Let a section find a value."""

    def rows(device: str) -> Iterator[Row]:
        yield Row(name, "c", "m", value, "ms", target="<= 2")

    module = ModuleType(name)
    module.__dict__["rows"] = rows
    monkeypatch.setitem(sys.modules, f"experiments.bench.{name}", module)


ECHO = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["x"] < 0:
        break
    print(json.dumps({"said": sys.argv[1], **asked}), flush=True)
"""


def test_a_peer_answers_until_it_ends(tmp_path: Path) -> None:
    environment, script = tmp_path / "venv", tmp_path / "echo.py"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    (environment / ".complete").write_text("not-needed")
    script.write_text(ECHO)
    script.with_name("json.py").write_text("raise RuntimeError('what lies beside the script is none of its modules')")
    peer = Peer(["not-needed"], environment, script, ["hello"])
    assert [peer.ask(x=x) for x in (1, 2)] == [{"said": "hello", "x": 1}, {"said": "hello", "x": 2}]
    with pytest.raises(OSError, match=r"echo\.py hello ended without an answer"):
        peer.ask(x=-1)
    peer.close()


def test_a_peer_installs_what_it_lacks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, script = tmp_path / "venv", tmp_path / "echo.py"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    script.write_text(ECHO)
    commands: list[list[str]] = []
    monkeypatch.setattr(
        "experiments.bench.peer.subprocess.run",
        lambda command, check: commands.append(command) or subprocess.CompletedProcess(command, 0),
    )
    for requirements in (["a"], ["a"], ["a", "b==1"], ["a", "b==1"]):
        Peer(requirements, environment, script, ["hello"]).close()
    assert [command[-1] for command in commands] == [str(environment), "a", str(environment), "b==1"]


def test_a_peer_whose_environment_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("experiments.bench.peer.ENVIRONMENT", tmp_path / "file" / "venv")
    with caplog.at_level("WARNING", logger="kvenv"):
        assert generate.start_peer(random_model(dtype=torch.float32), "cpu") is None
    assert "kvpress is left out" in caplog.text


@pytest.mark.slow
def test_generating_is_compared_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        asked: list[dict] = []

        def ask(self, **question: object) -> None:
            self.asked.append(question)

        def close(self) -> None:
            self.asked.append({})

    # Compiling switches it off for all the process.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    for name, value in {"REPEATS": {24: 1}, "BATCHES": (1,), "INTERVALS": {32: 8}}.items():
        monkeypatch.setattr(generate, name, value)
    monkeypatch.setattr(generate, "start_peer", lambda *_: Fake())
    rows = list(generate.rows("cpu"))
    assert [(row.metric, row.target) for row in rows] == [
        ("compiled, 32 / kvpress, 32", ">= 2.0"), ("compiled, 32 / full cache", ""),
        ("eager, 32 / kvpress, 32", ">= 1.0"), ("eager, 32 / full cache", ""),
    ]  # fmt: skip
    assert all(row.value > 0 and row.floor > row.value for row in rows)
    assert [(q["new"], q["budget"], q["interval"]) for q in Fake.asked[:-1]] == [(24, 32, 8)] * 2
    assert Fake.asked[-1] == {}


def test_a_profile_shows_what_takes_more_than_in_the_baseline() -> None:
    x = torch.randn(64, 64)
    rows = list(profile.differences("a case", lambda: (x @ x).cos(), lambda: (x @ x).sin(), "cpu"))
    assert rows[0].metric == "all"
    found = {row.metric: row for row in rows}
    assert found["aten::cos"].baseline == 0 < found["aten::cos"].value
    assert found["aten::mm"].baseline > 0
    assert "aten::sin" not in found
    assert [row.value - row.baseline for row in rows[1:]] == sorted(
        (row.value - row.baseline for row in rows[1:]), reverse=True
    )


def test_sections_are_added_to_the_numbers_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("ranking", 1.0), ("step", 3.0), ("ranking", 1.5)):
        section(name, monkeypatch, value)
        __main__.main([name, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "bench.json").read_text())["sections"]
    assert {name: [(row["value"], row["ratio"], row["met"]) for row in found[name]["rows"]] for name in found} == {
        "ranking": [(1.5, None, True)], "step": [(3.0, None, False)]
    }  # fmt: skip
    assert {"machine", "commit", "date", "command"} <= set(found["step"])
    shown = capsys.readouterr().out
    assert "<= 2 met" in shown
    assert "<= 2 missed" in shown


def test_what_was_measured_before_a_failure_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(device: str) -> Iterator[Row]:
        yield Row("ranking", "first case", "m", 3.0, "ms")
        raise ValueError("no more")

    section("ranking", monkeypatch, 1.0)
    monkeypatch.setattr(sys.modules["experiments.bench.ranking"], "rows", rows)
    with pytest.raises(ValueError, match="no more"):
        __main__.main(["ranking", "--out", str(tmp_path)])
    assert "first case" in capsys.readouterr().out
    assert not (tmp_path / "bench.json").exists()


def test_unknown_sections_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(__main__.main, ["speed"])
    assert ended.value.code == 2
    assert f"unknown section 'speed': known are {', '.join(SECTIONS)}" in capsys.readouterr().err
