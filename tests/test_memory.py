"""Out of memory: rows, tokens and what to lower in one line; an evaluation goes on with half of its batch."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.checkpoint import load_checkpoint
from agents.imitation import ImitationLearner
from experiments import cli, evaluate, train
from kvenv import answering, decode, golden, layerwise
from kvenv.evaluation import evaluate as rows_of
from kvenv.layerwise import rollout
from kvenv.memory import in_halves, out_of_memory, side_by_side
from tests.environments import single
from tests.policies import Mixed, Random, kvenv_model, random_traces
from tests.test_train import SMALL

ROOT = Path(__file__).resolve().parent.parent

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_what_runs_out_says_how_much_was_asked_for_and_what_to_lower(error: RuntimeError) -> None:
    asked = "16 traces of 512 tokens side by side exceed the memory: take fewer at once (--at-once"
    with pytest.raises(MemoryError, match=re.escape(asked)) as told, side_by_side(16, 512):
        raise error
    assert out_of_memory(error)
    assert "\n" not in str(told.value)
    assert told.value.__cause__ is error


def test_other_errors_stay_what_they_are() -> None:
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match=r"^shapes$"), side_by_side(1, 1):
        raise RuntimeError("shapes")


def test_parts_are_halved_until_they_fit_and_stay_so() -> None:
    ran: list[list[int]] = []

    def run(part: list[int]) -> list[int]:
        ran.append(part)
        if len(part) > 2:
            raise MemoryError(f"{len(part)} are too many")
        return [2 * x for x in part]

    def halve(part: list[int]) -> list[list[int]]:
        size = -(-len(part) // 2)
        return [part[start : start + size] for start in range(0, len(part), size)]

    parts = [list(range(7))]
    with pytest.warns(UserWarning, match="are too many; going on with half as many"):
        assert in_halves(parts, run, halve) == [0, 2, 4, 6, 8, 10, 12]
    assert parts == [[0, 1], [2, 3], [4, 5], [6]]
    assert ran == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3], [0, 1], [2, 3], [4, 5, 6], [4, 5], [6]]
    with pytest.raises(MemoryError, match="3 are too many"):
        in_halves([[1]], lambda part: run(3 * part), halve)


class Full:
    """A memory that holds so many rows; replaces what feeds an LLM."""

    def __init__(self, rows: int) -> None:
        self.rows, self.fed = rows, 0

    def __call__(self, model: Any, cache: Any, tokens: Any, *others: Any) -> Any:
        """Feed, if there is room."""
        if len(tokens) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.fed += 1
        return decode.feed(model, cache, tokens, *others)


class Source:
    """A few random traces."""

    name, split, size, max_prompt_length = "random", "test", 5, 0
    traces = random_traces([60, 44, 60, 52, 57])

    def __getitem__(self, number: int) -> Any:
        return self.traces[number]


@pytest.mark.parametrize("where", [layerwise, golden])
def test_an_evaluation_goes_on_with_half_and_gives_the_same_rows(where: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = Source()
    terms: dict[str, Any] = {"model": kvenv_model(), "budgets": [20, 24], "interval": 8, "seeds": [0, 1]}
    policies: dict[str, Any] = {"full": None, "random": Random(), "mixed": Mixed("stats", "future")}
    whole = list(rows_of(policies, source, range(5), batch_size=4, **terms))
    monkeypatch.setattr(where, "feed", Full(2))
    with pytest.warns(UserWarning, match=r"4 traces of 60 tokens side by side exceed .* going on with half as many"):
        halved = list(rows_of(policies, source, range(5), batch_size=4, **terms))
    assert [len(cell) for cell in halved] == [len(cell) for cell in whole]
    rows = [[asdict(row) for cell in cells for row in cell] for cells in (halved, whole)]
    for one, other in zip(*rows, strict=True):
        numbers = {name: value for name, value in other.items() if isinstance(value, float)}
        assert {name: one[name] for name in numbers} == pytest.approx(numbers, abs=1e-9)
        assert {**one, **numbers} == other
    monkeypatch.setattr(where, "feed", Full(0))
    with (
        pytest.raises(MemoryError, match="1 traces of 60 tokens side by side"),
        pytest.warns(UserWarning, match="half as many"),
    ):
        list(rows_of(policies, source, range(5), batch_size=4, **terms))


def test_answers_go_on_with_half_and_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = (
        "--tasks ruler/recall zeroshot/dialogue --policies full random --budgets 32 --num-traces 3 --trace-length 256"
    )
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    evaluate.main([*argv.split(), "--out", str(whole)])
    generate = answering._Questions._generate

    def full(self: Any, *others: Any) -> Any:
        with side_by_side(len(self.examples), 256):
            if len(self.examples) > 2:
                raise ERRORS[0]
        return generate(self, *others)

    monkeypatch.setattr(answering._Questions, "_generate", full)
    monkeypatch.setattr(layerwise, "feed", Full(8))
    with pytest.warns(UserWarning, match="going on with half as many"):
        evaluate.main([*argv.split(), "--out", str(halved)])
    assert (halved / "answers.jsonl").read_text() == (whole / "answers.jsonl").read_text()


def test_a_training_keeps_its_checkpoint_and_says_where_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, feed = ImitationLearner.update, layerwise.feed
    out = tmp_path / "run"

    def starved(self: ImitationLearner) -> dict[str, float]:
        layerwise.feed = Full(1) if self.done == 4 else feed  # type: ignore[assignment]
        return original(self)

    monkeypatch.setattr(ImitationLearner, "update", starved)
    monkeypatch.setattr(layerwise, "feed", feed)
    with pytest.raises(SystemExit) as stopped:
        cli.run(train.main, ["imitation", *SMALL, "--updates", "6", "--out", str(out)])
    assert stopped.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert "2 traces of 160 tokens side by side exceed the memory: take fewer at once (--at-once" in line
    assert line.endswith(f"--resume {out} goes on from update 3")
    assert load_checkpoint(out / "checkpoints").values["done"] == 3


def test_an_environment_says_its_rows_and_is_usable_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    env = single()
    env.reset(seed=0)
    with monkeypatch.context() as patch:
        patch.setattr("kvenv.dynamics.feed", Full(0))
        with pytest.raises(MemoryError, match="1 traces of 60 tokens side by side"):
            env.step(env.action_space.sample())
    env.reset(seed=0)
    assert np.isfinite(env.step(env.action_space.sample())[1])


def test_what_nobody_expected_to_run_out_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def command(_: Any) -> None:
        raise ERRORS[0]

    with pytest.raises(SystemExit) as stopped:
        cli.run(command)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("kvenv: error: out of memory: take fewer at once (--at-once")


STARVED = """
import resource, sys
import torch
from experiments.cli import run
from kvenv.layerwise import rollout
from tests.policies import Random, kvenv_model, random_traces

model, traces = kvenv_model(), random_traces([2000]) * 2000
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (384 << 20), resource.RLIM_INFINITY))
run(lambda _: rollout(Random(), traces, model=model, budget=1900, interval=16))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and other systems don't keep to RLIMIT_AS")
def test_a_real_allocation_that_fails_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", STARVED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("kvenv: error: 2000 traces of 2000 tokens side by side exceed the memory: take fewer")
    assert len(done.stderr.splitlines()) == 1


def test_a_rollout_names_rows_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "feed", Full(2))
    with pytest.raises(MemoryError, match="3 traces of 60 tokens side by side"):
        rollout(Random(), random_traces([60, 50, 40]), model=kvenv_model(), budget=20, interval=8)
