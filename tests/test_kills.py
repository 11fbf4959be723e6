"""kill -9 at random moments of writing: nothing that was finished is lost, and no half file loads."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import agents
from agents.checkpoint import KEPT, checkpoints, load_checkpoint, save_checkpoint
from experiments import cli
from experiments.results import ANSWERS, RESULTS, ROWS, Results, read_rows, writing
from experiments.runs import Run, read_metrics
from kvenv.files import ASIDE
from kvenv.identity import weights_digest
from kvenv.lock import LOCK, hold
from kvenv.store import StoreWriter, TraceStore
from tests.killing import RECORDING, ROOT, TERMS, Counter, Server, answers, policy, recorded, state

pytestmark = pytest.mark.filterwarnings("error")
ROUNDS = [10, pytest.param(100, marks=pytest.mark.slow)]
LONGEST = 0.1
"""Seconds that a writer lives at most after it has finished its first; it writes in that time some ten times."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Fork and kill writers."""
    with Server() as server:
        yield server


def moments(rounds: int) -> Iterator[float]:
    """Yield when to kill."""
    draw = random.Random(rounds)
    for _ in range(rounds):
        yield draw.uniform(0, LONGEST)


def leftovers(directory: Path) -> list[Path]:
    """Return what killed writers left half-written."""
    return sorted(directory.rglob(f"*{ASIDE}"))


@pytest.mark.parametrize("rounds", ROUNDS)
def test_the_newest_finished_checkpoint_is_loaded(server: Server, tmp_path: Path, rounds: int) -> None:
    done = 0
    for seconds in moments(rounds):
        said = server.run("write_checkpoints", tmp_path, seconds)
        found = load_checkpoint(tmp_path)
        # Killed between the last rename and saying so, it is there all the same.
        assert found.values["done"] in (said, said + 1)
        assert said > done
        done = found.values["done"]
        assert torch.equal(found.tensors["weights"], torch.full((64, 64), float(done)))
    assert len(checkpoints(tmp_path)) <= KEPT + 1


def test_what_lies_beside_the_kept_checkpoints_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / "00000007").mkdir()
    (tmp_path / "00000007" / f".state.json.x{ASIDE}").write_text("{")
    (tmp_path / "notes").mkdir()
    save_checkpoint(tmp_path, state(8), 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000008", "notes"]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_every_finished_shard_is_in_the_store(server: Server, tmp_path: Path, rounds: int) -> None:
    done = 0
    for seconds in moments(rounds):
        said = server.run("write_store", tmp_path, seconds)
        store = TraceStore(tmp_path)
        assert len(store) in (said, said + 1)
        assert said > done
        done = len(store)
    for shard in store.shards:
        store.verify(shard)
    for number, trace in enumerate(store):
        expected = recorded(number)
        assert trace.name == expected.name
        assert all(torch.equal(getattr(trace, name), getattr(expected, name)) for name in ("keys", "values", "utility"))
    with hold(tmp_path):
        StoreWriter(tmp_path, RECORDING).add([recorded(done)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.json",
        *(f"shard-{number:05d}.safetensors" for number in range(done + 1)),
    ]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_no_finished_row_is_lost(server: Server, tmp_path: Path, rounds: int) -> None:
    done, journals = 0, 0
    for seconds in moments(rounds):
        said = server.run("write_results", tmp_path, seconds)
        journals += (tmp_path / ROWS).exists()
        results = Results(tmp_path, TERMS)
        assert len(results.rows) // 2 in (said, said + 1)
        assert said > done
        done = len(results.rows) // 2
        assert results.rows == [answer.row for trace in range(done) for answer in answers(trace)]
        assert not results.missing("q", range(done), 2)
    assert journals, "none was killed before it had written everything"
    with writing(tmp_path, TERMS):
        pass
    assert read_rows(tmp_path / RESULTS) == results.rows
    lines = [json.loads(line) for line in (tmp_path / ANSWERS).read_text().splitlines()]
    assert [(line["trace"], line["policy"]) for line in lines] == [(row.trace, row.policy) for row in results.rows]
    assert sorted(path.name for path in tmp_path.iterdir()) == [ANSWERS, "config.json", RESULTS]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_policy_is_whole_or_refused_and_the_next_save_mends_it(server: Server, tmp_path: Path, rounds: int) -> None:
    for seconds in moments(rounds):
        said = server.run("write_policies", tmp_path, seconds)
        description, weights = json.loads((tmp_path / "policy.json").read_text()), tmp_path / "policy.safetensors"
        if description["fingerprint"] != weights_digest(load(weights.read_bytes()).items()):
            with pytest.raises(ValueError, match=r"policy\.safetensors is damaged or of another policy"):
                agents.make(tmp_path)
        else:
            found = agents.make(tmp_path)
            assert found.training["updates_done"] in (said, said + 1)
            expected = policy(found.training["updates_done"])
            for mine, theirs in zip(found.scorer.parameters(), expected.scorer.parameters(), strict=True):
                assert torch.equal(mine, theirs)
        policy(0).save_pretrained(tmp_path)
        assert agents.make(tmp_path).training == {"updates_done": 0}


@pytest.mark.parametrize("rounds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_goes_on_from_its_newest_checkpoint(server: Server, tmp_path: Path, rounds: int) -> None:
    for seconds in moments(rounds):
        said = server.run("write_run", tmp_path, seconds)
        learner, run = Counter(), Run(tmp_path)
        run.restore(learner)
        assert learner.done in (said, said + 1)
        assert agents.make(tmp_path / "policy").training["updates_done"] == learner.done
    with hold(tmp_path), run.writing(learner.done):
        run.log(learner.done + 1, learner.update())
        run.save(learner)
    steps = list(range(1, learner.done + 1))
    assert [(line["step"], line["loss/count"]) for line in read_metrics(tmp_path)] == [(step, step) for step in steps]
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss/count")] == steps
    assert not [path for path in leftovers(tmp_path) if "checkpoints" not in path.parts]
    assert not (tmp_path / LOCK).exists()


COMMANDS = {
    "evaluate": ([*"evaluate --traces recall --trace-length 96 --num-traces 12 --budgets 24 --batch-size 1".split(),
                  *"--policies random keydiff".split()], ROWS, (RESULTS,)),
    "record": ("record --traces recall --trace-length 96 --num-traces 12 --batch-size 1".split(), "index.json",
               ("index.json", "shard-00000.safetensors", "shard-00011.safetensors")),
}  # fmt: skip
"""Commands, what shows that they have finished something, and what they make."""


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_goes_on_to_the_same_files(name: str, tmp_path: Path) -> None:
    command, begun, made = COMMANDS[name]
    cli.main([*command, "--out", str(tmp_path / "whole")])
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "experiments.cli", *command, "--out", str(out)], cwd=ROOT)
    while not (out / begun).exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was over before it was killed: make it longer"
    assert not (out / made[-1]).exists()
    cli.main([*command, "--out", str(out)])
    for file in made:
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_killed_holder_holds_nothing(server: Server, tmp_path: Path) -> None:
    process = server.start("hold_forever", tmp_path)
    with pytest.raises(ValueError, match=rf"is being written by process {process} on \S+: wait"), hold(tmp_path):
        pytest.fail("two hold it")
    assert server.kill(process) == 1
    assert (tmp_path / LOCK).exists()
    with hold(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
