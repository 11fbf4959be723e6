"""An evaluation's directory: what was measured stays, and nothing else is put beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import agents
from experiments import evaluate as command
from experiments.results import ANSWERS, CONFIG, RESULTS, read_rows
from kvenv.answering import answer
from kvenv.evaluation import Row, evaluate
from kvenv.tasks import Question, QuestionTask

SMALL = ["--traces", "recall", "--trace-length", "96", "--num-traces", "3", "--budgets", "24", "--batch-size", "1"]
POLICIES = ["--policies", "random", "keydiff"]


def run(out: Path, *options: str, policies: list[str] | None = None) -> list[Row]:
    command.main([*SMALL, *(policies or POLICIES), "--out", str(out), *options])
    return read_rows(out / RESULTS)


def kill_after(cells: int, monkeypatch: pytest.MonkeyPatch, name: str, original) -> None:
    def killed(*args, **options) -> Iterator[list[Row]]:
        for number, cell in enumerate(original(*args, **options)):
            if number == cells:
                raise KeyboardInterrupt
            yield cell

    monkeypatch.setattr(command, name, killed)


def test_a_killed_evaluation_goes_on_to_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_after(3, patch, "evaluate", evaluate)  # one batch of both policies, and half of the next
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    assert read_rows(tmp_path / "killed" / RESULTS) == whole[:2]
    assert run(tmp_path / "killed") == whole


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(tmp_path)
    kill_after(0, monkeypatch, "evaluate", evaluate)
    assert run(tmp_path) == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budgets", "32"], r"with budgets \[24\], not \[32\]"),
        (["--num-traces", "2"], "with num_traces 3, not 2"),
        (["--sinks", "5"], "with sinks 4, not 5"),
        (["--policies", "random", "knorm"], r"with policies \[.*keydiff'\], not \[.*knorm'\]"),
    ],
)
def test_other_terms_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    rows = run(tmp_path)
    with pytest.raises(ValueError, match=message + ".*: choose another --out"):
        run(tmp_path, *options)
    assert read_rows(tmp_path / RESULTS) == rows


def test_a_policy_that_was_trained_on_is_another_one(tmp_path: Path) -> None:
    directory = tmp_path / "policy"
    agents.make("kvp-tiny").save_pretrained(directory)
    policies = ["--policies", "random", str(directory)]
    run(tmp_path / "out", policies=policies)
    description = json.loads((directory / "policy.json").read_text())
    (directory / "policy.json").write_text(json.dumps(description | {"training": {"updates": 7}}))
    with pytest.raises(ValueError, match=r"with policies .*: choose another --out"):
        run(tmp_path / "out", policies=policies)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no config.json that says of what"), ("{", "is not the configuration"), ("[]", "is not the configuration")],
)
def test_results_of_nobody_knows_what_are_left_alone(text: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text("[]\n")
    if text is not None:
        (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message):
        run(tmp_path)
    assert (tmp_path / RESULTS).read_text() == "[]\n"


def questions() -> QuestionTask:
    made = [Question(f"q/{i}", tuple(range(3, 40)), (41, 42 + i), ("a", "b"), 2) for i in range(3)]
    return QuestionTask("questions", "prefill", made, lambda text, references: float(len(references) == 2))


def test_answers_lie_beside_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_tasks", lambda name, setting: [questions()])
    options = ["--tasks", "x", "--traces"]
    with monkeypatch.context() as patch:
        kill_after(3, patch, "answer", answer)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *options)
    # Killed between the two files: an answer whose row isn't there.
    with (tmp_path / ANSWERS).open("a") as file:
        file.write(json.dumps({"traces": "questions", "trace": 2}) + "\n")
    rows = run(tmp_path, *options)
    answers = [json.loads(line) for line in (tmp_path / ANSWERS).read_text().splitlines()]
    named = ("traces", "trace", "policy", "budget", "seed", "score")
    assert [[line[name] for name in named] for line in answers] == [
        [getattr(row, name) for name in named] for row in rows
    ]
    assert len(rows) == 6
    assert {row.score for row in rows} == {1.0}
    assert {tuple(line["references"]) for line in answers} == {("a", "b")}
    assert {line["example"] for line in answers} == {"q/0", "q/1", "q/2"}
    assert all(isinstance(line["text"], str) for line in answers)


def test_who_knows_the_future_is_left_out_of_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "load_tasks", lambda name, setting: [questions()])
    rows = run(tmp_path, "--tasks", "x", "--traces", policies=["--policies", "golden", "keydiff"])
    assert {row.policy for row in rows} == {"keydiff", "random"}
    captured = capsys.readouterr()
    assert "questions: golden left out" in captured.err
    assert "score" in captured.out
    assert "tokens" in captured.out
    assert "answer" not in captured.out.split("Mean")[0]


def test_fewer_examples_than_asked_for_are_all_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_tasks", lambda name, setting: [questions()])
    rows = run(tmp_path, "--tasks", "x", "--traces", "--first-trace", "1", "--num-traces", "10")
    assert {row.trace for row in rows} == {1, 2}
    with pytest.raises(ValueError, match="has 3 examples: --first-trace 3 is beyond"):
        run(tmp_path / "other", "--tasks", "x", "--traces", "--first-trace", "3")


def test_what_is_wrong_with_the_last_task_is_said_before_the_first_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = [Question("q/0", (), (), ("a",), 2)]
    tasks = {"one": questions(), "other": replace(questions(), name="empty", examples=empty)}
    monkeypatch.setattr(command, "load_tasks", lambda name, setting: [tasks[name]])
    with pytest.raises(ValueError, match="q/0: the prompt is empty"):
        run(tmp_path, "--tasks", "one", "other", "--traces")
    assert not list(tmp_path.iterdir())
