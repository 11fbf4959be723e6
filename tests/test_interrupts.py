"""Real SIGINTs at chosen moments: exit code 130, one line, and a state from which another call goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import agents
from agents.checkpoint import load_checkpoint
from experiments import evaluate, record
from experiments.results import read_rows
from tests.test_train import arguments, assert_same_run, straight
from tests.test_train import train as train_command

__all__ = ["straight"]

ROOT = Path(__file__).resolve().parent.parent

WAITS = """
import sys, time
from importlib import import_module
from experiments import runs
from experiments.cli import run

command, where, number, *argv = sys.argv[1:]
module, *path, name = where.split(":")
main, owner, calls, note = import_module(command).main, import_module(module), 0, runs.Interruption._note
for part in path:
    owner = getattr(owner, part)
original = getattr(owner, name)

def waits(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(number):
        print("\\nhere", flush=True)
        time.sleep(60)
    return original(*args, **kwargs)

def notes(self, *args):
    note(self, *args)
    print("noted", flush=True)

setattr(owner, name, waits)
runs.Interruption._note = notes
run(main, argv)
"""
"""Runs a command that waits a minute at a call of a function, and says so."""


def interrupted(command: str, where: str, number: int, argv: Sequence[str], signals: int = 1) -> tuple[int, str]:
    """Interrupt a command so many times at a call of a function; return its exit code and what it said last."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, f"experiments.{command}", where, str(number), *argv],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in a shell's background, SIGINT would be ignored from the start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    assert process.stdout is not None
    for awaited in ("here", "noted")[:signals]:
        while (line := process.stdout.readline()).strip() != awaited:
            assert line, process.communicate()[1]
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("where", "number"),
    [
        pytest.param("agents.imitation:Student:learn", 4 * 35 + 20, id="in an update"),
        pytest.param("agents.checkpoint:write_atomic", 4, id="in a checkpoint", marks=pytest.mark.slow),
        pytest.param("agents.learned:write_atomic", 4, id="in a policy", marks=pytest.mark.slow),
        pytest.param("experiments.validation:evaluate", 3, id="in a validation", marks=pytest.mark.slow),
    ],
)
def test_the_second_ends_a_training_at_once(where: str, number: int, tmp_path: Path, straight: Path) -> None:
    out = tmp_path / "out"
    assert interrupted("train", where, number, arguments(out), signals=2) == (130, "kvenv: interrupted")
    done = load_checkpoint(out / "checkpoints").values["done"]
    policy: Any = agents.make(out / "policy")
    # What is interrupted between two files has the older text, and never none.
    assert policy.training["updates_done"] in (done, done + 3)
    assert done < 11
    train_command.main(["--resume", str(out)])
    assert_same_run(out, straight)


def test_an_evaluation_keeps_its_rows_and_goes_on(tmp_path: Path) -> None:
    options = "--policies random knorm --budgets 32 --num-traces 6 --batch-size 2 --trace-length 128 --out".split()
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert interrupted("evaluate", "kvenv.evaluation:rollout", 4, [*options, str(out)]) == (130, "kvenv: interrupted")
    assert {row.trace for row in read_rows(out / "results.json")} == {0, 1}
    for directory in (out, whole):
        evaluate.main([*options, str(directory)])
    assert read_rows(out / "results.json") == read_rows(whole / "results.json")


@pytest.mark.slow
def test_a_recording_keeps_its_shards_and_goes_on(tmp_path: Path) -> None:
    options = "--traces recall --num-traces 5 --batch-size 2 --trace-length 96 --out".split()
    whole, out = tmp_path / "whole", tmp_path / "out"
    # The second shard is written, the index that lists it is not.
    assert interrupted("record", "kvenv.store:write_atomic", 4, [*options, str(out)]) == (130, "kvenv: interrupted")
    for directory in (out, whole):
        record.main([*options, str(directory)])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


@pytest.mark.slow
def test_an_answer_can_be_broken_off() -> None:
    argv = ["the", "--max-new-tokens", "200", "--budget", "64", "--interval", "16"]
    assert interrupted("generate", "experiments.generate:Clock:put", 10, argv) == (130, "kvenv: interrupted")
