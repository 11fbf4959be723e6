"""The report of runs holds what they measured, by update and by wall clock, and refuses what is no run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import report
from experiments.report import load


def make(directory: Path, learner: str = "imitation", updates: int = 4, torn: bool = False) -> Path:
    """Write a run that measured something."""
    directory.mkdir(parents=True)
    config = {"learner": learner, "arguments": {"learner": {"updates": 4}}, "commit": None, "version": "0"}
    (directory / "config.json").write_text(json.dumps(config))
    lines = [{"step": 0, "eval/answer_loss": 4.0, "time/total": 0.0}]
    for step in range(1, updates + 1):
        line = {"step": step, "loss/ranking": 1 / step, "time/total": 2.5 * step}
        lines.append(line | ({"eval/answer_loss": abs(step - 3) + 0.5} if step % 2 == 0 or step == 3 else {}))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text + '{"step": 9, "ev' * torn)
    return directory


def test_the_table_and_the_curves_hold_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make(tmp_path / "one"), make(tmp_path / "two", "grpo", updates=2, torn=True)]
    report.main([*map(str, runs), "--out", str(tmp_path / "report")])
    lines = (tmp_path / "report/report.md").read_text().splitlines()
    assert lines[0].startswith("| run | learner | updates | training | answer loss |")
    assert lines[2] == "| one | imitation | 4 | 10 s | 1.500 | - | - | - | - | - | 0.500 @ 3 |"
    assert lines[3] == "| two | grpo | 2 of 4 | 5 s | 1.500 | - | - | - | - | - | 1.500 @ 2 |"
    assert (tmp_path / "report/report.png").read_bytes().startswith(b"\x89PNG")
    assert "0.500 @ 3" in capsys.readouterr().out


def test_curves_go_by_update_and_by_seconds_of_training(tmp_path: Path) -> None:
    (curves,) = load([make(tmp_path / "one")])
    assert curves.of("eval/answer_loss") == ([0, 2, 3, 4], [0.0, 5.0, 7.5, 10.0], [4.0, 1.5, 0.5, 1.5])


def test_runs_of_equal_names_are_told_apart(tmp_path: Path) -> None:
    runs = [make(tmp_path / "a/seed0"), make(tmp_path / "b/seed0")]
    assert [one.name for one in load(runs)] == ["a/seed0", "b/seed0"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no runs"):
        load([])
    with pytest.raises(ValueError, match=r"is no run: it has no config\.json"):
        load([tmp_path])
    run = make(tmp_path / "run")
    with pytest.raises(ValueError, match="one is given twice"):
        load([run, run])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has measured nothing yet"):
        load([run])


def test_a_configuration_without_its_number_of_updates_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "one")
    for arguments in ({}, {"learner": 3}, {"learner": {"updates": None}}):
        config = {"learner": "grpo", "arguments": arguments, "commit": None}
        (tmp_path / "one/config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"config\.json doesn't say how many updates were planned"):
            load([tmp_path / "one"])
