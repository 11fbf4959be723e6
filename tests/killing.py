"""Processes that write until they are killed: a server imports once and forks a writer per request.

A writer says what it has finished, so that a test knows what must not be lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from agents.checkpoint import checkpoints, save_checkpoint
from agents.kvp_scorer import KVPPolicy, KVPScorer
from agents.learner import Learner, State
from experiments.results import writing
from experiments.runs import CONFIG, Run
from kvenv.answering import Answer
from kvenv.evaluation import Row
from kvenv.lock import hold
from kvenv.recording import RecordedTrace, Recording
from kvenv.rotary import Rotary
from kvenv.store import StoreWriter

ROOT = Path(__file__).resolve().parent.parent
TERMS = {"budgets": [24]}
RECORDING = Recording(
    model="none", fingerprint="0" * 64, layers=2, kv_heads=2, head_dim=4, inv_freq=[1.0, 0.5], rotary_scaling=1.0,
    traces="none", split="train", trace_length=20, first_trace=0, interval=4, reduce="max", dtype="float32",
)  # fmt: skip


def recorded(number: int) -> RecordedTrace:
    """Return a trace that is all of one number; 18 of its 19 pairs' cuts are 4, 8, 12 and 16."""
    pairs = torch.full((2, 2, 19, 4), float(number))
    utility, tokens = torch.full((2, 2, 40), float(number)), torch.full((20,), number)
    return RecordedTrace(f"none/{number}", 4, pairs, pairs + 1, utility, tokens, Rotary(torch.tensor([1.0, 0.5]), 1.0))


def state(number: int) -> State:
    """Return a state that is all of one number."""
    return State({"weights": torch.full((64, 64), float(number))}, {"done": number})


def answers(trace: int) -> list[Answer]:
    """Return a batch: the answers of two policies to an example."""
    row = {"traces": "q", "split": "test", "trace": trace, "seed": 0, "budget": 24, "interval": 16, "score_from": 0}
    rows = [Row(policy=name, schedule="prefill", score=1.0, **row) for name in ("random", "h2o")]
    return [Answer(row, f"q/{trace}", "text " * 50, ("a",)) for row in rows]


def policy(number: int) -> KVPPolicy:
    """Return a policy whose weights and training are all of one number."""
    scorer = KVPScorer(2, 2, 4, 4, 4, [1.0, 0.5], torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.fill_(number)
    return KVPPolicy(scorer, "counted", {"updates_done": number})


class Counter(Learner):
    """Learns to count."""

    name = "counter"

    @property
    def policy(self) -> KVPPolicy:
        """Return a policy of as many updates."""
        return policy(self.done)

    def update(self) -> dict[str, float]:
        """Count."""
        self.done += 1
        return {"loss/count": float(self.done)}

    def state(self) -> State:
        """Return the count."""
        return state(self.done)

    def restore(self, state: State) -> None:
        """Go on counting."""
        self.done = int(state.values["done"])


def say(number: int) -> None:
    """Tell the test what is finished."""
    os.write(1, f"{number}\n".encode())


def write_checkpoints(directory: Path) -> None:
    """Write checkpoint after checkpoint."""
    there = checkpoints(directory)
    number = int(there[-1].name) if there else 0
    while True:
        number += 1
        save_checkpoint(directory, state(number), number)
        say(number)


def write_store(directory: Path) -> None:
    """Write shard after shard."""
    with hold(directory):
        writer = StoreWriter(directory, RECORDING)
        while True:
            writer.add([recorded(writer.recorded)])
            say(writer.recorded)


def write_results(directory: Path) -> None:
    """Take in batch after batch, in evaluations of five."""
    while True:
        with writing(directory, TERMS) as results:
            for _ in range(5):
                results.add(answers(len(results.rows) // 2))
                say(len(results.rows) // 2)


def write_policies(directory: Path) -> None:
    """Save policy after policy."""
    number = 0
    while True:
        number += 1
        policy(number).save_pretrained(directory)
        say(number)


def write_run(directory: Path) -> None:
    """Train, and save after every update."""
    learner = Counter()
    with hold(directory):
        run = Run(directory) if (directory / CONFIG).exists() else Run.create(directory, "counter", _Nothing())
        run.restore(learner)
        with run.writing(learner.done):
            while True:
                run.log(learner.done + 1, learner.update())
                run.save(learner)
                say(learner.done)


def hold_forever(directory: Path) -> None:
    """Hold a directory."""
    with hold(directory):
        say(1)
        time.sleep(600)


WRITERS: dict[str, Callable[[Path], None]] = {
    writer.__name__: writer
    for writer in (write_checkpoints, write_store, write_results, write_policies, write_run, hold_forever)
}


class Server:
    """Forks writers and kills them."""

    def __enter__(self) -> Server:
        command = [sys.executable, "-m", "tests.killing"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0
        assert self.process.stdout is not None
        self.process.stdout.close()

    def start(self, writer: str, directory: Path) -> int:
        """Start a writer and return its process id when it has finished its first."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{writer} {directory}\n")
        self.process.stdin.flush()
        process = int(self.process.stdout.readline())
        self.said = int(self.process.stdout.readline())
        return process

    def kill(self, process: int) -> int:
        """Kill a writer (SIGKILL) and return what it said last."""
        assert self.process.stdout is not None
        os.kill(process, signal.SIGKILL)
        while (line := self.process.stdout.readline().strip()).isdigit():
            self.said = int(line)
        assert line == f"ended by {signal.SIGKILL}", line
        return self.said

    def run(self, writer: str, directory: Path, seconds: float) -> int:
        """Let a writer write for some time, kill it, and return what it said last."""
        process = self.start(writer, directory)
        time.sleep(seconds)
        return self.kill(process)


class _Nothing:
    """Stands for arguments."""

    __dataclass_fields__: dict[str, Any] = {}


def serve() -> None:
    """Fork a writer for every line of stdin, and say its process id and how it ended."""
    torch.set_num_threads(1)
    while line := sys.stdin.readline():
        writer, directory = line.split(maxsplit=1)
        if not (process := os.fork()):
            os.write(1, f"{os.getpid()}\n".encode())
            try:
                WRITERS[writer](Path(directory.strip()))
            finally:
                os._exit(1)
        _, status = os.waitpid(process, 0)
        os.write(1, f"ended by {os.WTERMSIG(status) if os.WIFSIGNALED(status) else 'itself'}\n".encode())


if __name__ == "__main__":
    serve()
