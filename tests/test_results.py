"""An evaluation's directory: what was measured stays, and nothing else is put beside it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import agents
import kvenv
from experiments import evaluate as command
from experiments.results import ANSWERS, CONFIG, RESULTS, Results, digest, read_rows
from experiments.runs import Run
from kvenv.answering import Answer, answer
from kvenv.evaluation import Row, evaluate
from kvenv.tasks import Question, QuestionTask

SMALL = ["--traces", "recall", "--trace-length", "96", "--num-traces", "3", "--budgets", "24", "--batch-size", "1"]
POLICIES = ["--policies", "random", "keydiff"]


def run(out: Path, *options: str, policies: list[str] | None = None) -> list[Row]:
    command.main([*SMALL, *(policies or POLICIES), "--out", str(out), *options])
    return read_rows(out / RESULTS)


def kill_after(cells: int, monkeypatch: pytest.MonkeyPatch, name: str, original) -> None:
    made = itertools.count()

    def killed(*args, **options) -> Iterator[list[Row]]:
        for cell in original(*args, **options):
            if next(made) == cells:
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


def test_a_policy_that_was_uploaded_anew_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshot"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    agents.make("kvp-tiny").save_pretrained(snapshot)
    policies = ["--policies", "random", "owner/name"]
    rows = run(tmp_path / "out", policies=policies)
    assert run(tmp_path / "out", policies=policies) == rows
    agents.make("grpo-tiny").save_pretrained(snapshot)
    with pytest.raises(ValueError, match=r"with policies \['random', 'owner/name \(.*: choose another --out"):
        run(tmp_path / "out", policies=policies)


def test_traces_that_were_edited_are_others(tmp_path: Path) -> None:
    file, options = tmp_path / "mine.jsonl", ["--traces", str(tmp_path / "mine.jsonl"), "--num-traces", "1"]
    file.write_text(json.dumps({"input_ids": [*range(3, 90)]}))
    rows = run(tmp_path / "out", *options)
    file.write_text(file.read_text())
    assert run(tmp_path / "out", *options) == rows
    file.write_text(json.dumps({"input_ids": [*range(4, 91)]}))
    with pytest.raises(ValueError, match=r"with traces \['.*mine.jsonl \(\w+\)'\], not \[.*: choose another --out"):
        run(tmp_path / "out", *options)


def edit_data(data: Path, _: pytest.MonkeyPatch) -> None:
    (data / "aime24.jsonl").write_text("other")


def add_data(data: Path, _: pytest.MonkeyPatch) -> None:
    (data / "text.txt").write_text("more")


def edit_template(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvenv.load_model("tiny").tokenizer, "chat_template", "{{ messages[0].content }}")


def edit_ends(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvenv.load_model("tiny").model.generation_config, "eos_token_id", [3, 4])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_data, r"with task_data .*data \(\w+\), not .*data \(\w+\)"),
        (add_data, r"with task_data .*data \(\w+\), not .*data \(\w+\)"),
        (edit_template, r"with chat_template None, not \w+"),
        (edit_ends, r"with eos_token_id 3, not \[3, 4\]"),
    ],
)
def test_answers_to_what_was_edited_are_others(
    edit: Callable[[Path, pytest.MonkeyPatch], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_tasks", lambda name, setting: [questions()])
    data = tmp_path / "data"
    data.mkdir()
    (data / "aime24.jsonl").write_text("one")
    options = ["--tasks", "x", "--traces", "--task-data", str(data)]
    rows = run(tmp_path / "out", *options)
    assert run(tmp_path / "out", *options) == rows
    edit(data, monkeypatch)
    with pytest.raises(ValueError, match=message + ": choose another --out"):
        run(tmp_path / "out", *options)


def test_digests_tell_names_and_contents_apart(tmp_path: Path) -> None:
    def made(name: str, **files: str) -> str:
        (tmp_path / name / "below").mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        return digest(tmp_path / name)

    assert made("one", a="x", b="y") == made("same", b="y", a="x")
    assert len({made("two", a="y", b="x"), made("three", a="x"), made("four", ab="xy"), digest(tmp_path / "one")}) == 4


def test_a_training_run_is_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run.create(tmp_path, "grpo", command.Args())
    before = (tmp_path / CONFIG).read_bytes()
    monkeypatch.setattr(command, "evaluate", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(
        ValueError, match=r"config\.json is not the configuration of an evaluation: choose another --out"
    ):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG]
    assert (tmp_path / CONFIG).read_bytes() == before


def test_what_was_killed_within_the_first_write_begins_anew_on_the_same_terms_only(tmp_path: Path) -> None:
    rows = run(tmp_path)
    (tmp_path / RESULTS).unlink()
    saved = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(saved | {"commit": "before"}))
    with pytest.raises(ValueError, match=r"with budgets \[24\], not \[32\]"):
        run(tmp_path, "--budgets", "32")
    assert not (tmp_path / RESULTS).exists()
    assert run(tmp_path) == rows
    assert json.loads((tmp_path / CONFIG).read_text()) == saved  # rows are those of this commit


@pytest.mark.parametrize("text", ["{", "[]", '"terms"', "{}", '{"terms": []}', '{"terms": null}', b"\xff"])
def test_a_foreign_configuration_is_refused(text: str | bytes, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"config\.json is not the configuration of an evaluation"):
        Results(tmp_path, {"budgets": [24]})


def test_answers_of_nobody_knows_what_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ANSWERS).write_text("")
    with pytest.raises(ValueError, match=r"has answers\.jsonl, but no config\.json"):
        Results(tmp_path, {})


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
        file.write(json.dumps(json.loads((tmp_path / ANSWERS).read_text().splitlines()[0]) | {"trace": 2}) + "\n")
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


@pytest.fixture
def answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of an evaluation of questions: three examples, two policies."""
    monkeypatch.setattr(command, "load_tasks", lambda name, setting: [questions()])
    run(tmp_path, "--tasks", "x", "--traces")
    return tmp_path


def by_example(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.trace, row.policy))


def test_examples_of_which_rows_are_missing_are_measured_anew(answered: Path) -> None:
    rows = read_rows(answered / RESULTS)
    lines = (answered / RESULTS).read_text().splitlines()
    # Of example 0 one row is missing, example 1 was doubled.
    (answered / RESULTS).write_text("[\n" + "\n".join([*lines[2:-2], *lines[3:5], lines[-2]]) + "\n]\n")
    assert by_example(run(answered, "--tasks", "x", "--traces")) == by_example(rows)
    answers = [json.loads(line) for line in (answered / ANSWERS).read_text().splitlines()]
    assert len({(line["trace"], line["policy"]) for line in answers}) == len(answers) == len(rows)


def cut_line(text: str) -> str:
    return text[:-20]


def cut_field(text: str) -> str:
    return text.replace('"policy"', '"who"', 1)


def no_budget(text: str) -> str:
    return text.replace('"budget": ', '"budget": {}, "b": ', 1)


def cut_object(text: str) -> str:
    return "7\n" + text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_line, r"answers\.jsonl:6: not JSON"),
        (cut_field, r"answers\.jsonl:1: lacks policy"),
        (no_budget, r"answers\.jsonl:1: budget \{\} is none"),
        (cut_object, r"answers\.jsonl:1: int where an object was expected"),
        (lambda text: text[: text.index("\n") + 1], r"answers\.jsonl lacks the answers of 5 rows of results\.json"),
        (lambda text: None, r"answers\.jsonl lacks the answers of 6 rows of results\.json"),
    ],
)
def test_damaged_answers_are_refused_by_name(
    damage: Callable[[str], str | None], message: str, answered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = damage((answered / ANSWERS).read_text())
    rows = (answered / RESULTS).read_bytes()
    (answered / ANSWERS).unlink()
    if text is not None:
        (answered / ANSWERS).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        run(answered, "--tasks", "x", "--traces")
    assert error.type is ValueError
    assert str(answered / ANSWERS) in str(error.value)
    assert (answered / RESULTS).read_bytes() == rows


@pytest.mark.parametrize("text", ["[", "{}", "5", "[5]", b"\xff"])
def test_damaged_rows_are_refused_by_name(text: str | bytes, answered: Path) -> None:
    (answered / RESULTS).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"results\.json is not a results\.json") as error:
        run(answered, "--tasks", "x", "--traces")
    assert error.type is ValueError


def test_an_interrupted_batch_is_not_there_at_all(tmp_path: Path) -> None:
    results = Results(tmp_path, {})
    row = Row("random", "x", "test", 0, 0, 24, 16, "prefill", 0, score=1.0)
    told = [Answer(replace(row, trace=trace), f"x/{trace}", "text", ("a",)) for trace in range(4)]
    results.add(told[:2])

    def interrupted() -> Iterator[Answer]:
        yield told[2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.add(interrupted())
    results.write()
    assert [row.trace for row in read_rows(tmp_path / RESULTS)] == [0, 1]
    assert [row.trace for row in Results(tmp_path, {}).rows] == [0, 1]


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
