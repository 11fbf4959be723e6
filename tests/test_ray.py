"""Trainings, recordings and evaluations on Ray: the results of one process, whatever dies meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.learner import Share
from experiments import crew, evaluate, record, replicas, train
from experiments.replicas import Broadcast, Replica
from experiments.runs import read_metrics

ray: Any = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:worker . died")]

DECODED = ["--traces", "recall+tracking", "--trace-length", "128"]
RUN = ["--eval-every", "2", "--eval-traces", "20", "--eval-budgets", "32", "--save-every", "1"]
GRPO = [
    "grpo",
    *DECODED,
    *RUN,
    "--budgets",
    "32",
    "--num-traces",
    "4",
    "--group",
    "3",
    "--hidden",
    "4",
    "--updates",
    "3",
]
OF_TWO = ["--ray", "local", "--workers", "2"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as workers do: sums of several threads are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cluster() -> Iterator[None]:
    """Start Ray for a test."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train.main([*GRPO, "--at-once", "1", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store that one process recorded."""
    out = tmp_path_factory.mktemp("store") / "store"
    record.main(recording(out))
    return out


def recording(out: Path) -> list[str]:
    """Return the arguments of a recording of three shards."""
    return [*DECODED, "--num-traces", "5", "--batch-size", "2", "--out", str(out)]


def assert_same_run(one: Path, two: Path) -> None:
    """Compare policies bit for bit, and all metrics that are no times."""
    assert (one / "policy" / "policy.safetensors").read_bytes() == (two / "policy" / "policy.safetensors").read_bytes()
    ours, theirs = (
        [{tag: value for tag, value in line.items() if not tag.startswith("time/")} for line in read_metrics(run)]
        for run in (one, two)
    )
    assert len(ours) == 4
    assert ours == theirs


@pytest.mark.parametrize("workers", ["1", "2"])
def test_however_many_workers_grpo_makes_the_updates_of_one_process(
    workers: str, cluster: None, alone: Path, tmp_path: Path
) -> None:
    train.main([*GRPO, "--ray", "local", "--workers", workers, "--out", str(tmp_path / "run")])
    assert_same_run(alone, tmp_path / "run")


def test_kvp_makes_the_updates_of_one_process(cluster: None, store: Path, tmp_path: Path) -> None:
    options = ["kvp", *DECODED, *RUN, "--store", str(store), "--updates", "3", "--batch-size", "3", "--hidden", "8"]
    train.main([*options, "--out", str(tmp_path / "one")])
    train.main([*options, *OF_TWO, "--out", str(tmp_path / "two")])
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_recordings_and_evaluations_are_those_of_one_process(cluster: None, store: Path, tmp_path: Path) -> None:
    record.main([*recording(tmp_path / "store"), *OF_TWO])
    assert len(list(store.iterdir())) >= 4
    for file in store.iterdir():
        assert file.read_bytes() == (tmp_path / "store" / file.name).read_bytes(), file.name
    options = ["--traces", "recall", "--tasks", "ruler/recall", "--trace-length", "256", "--num-traces", "5"]
    options += ["--budgets", "48", "--batch-size", "2", "--policies", "full", "h2o", "random", "golden"]
    for name, where in (("one", []), ("two", OF_TWO)):
        evaluate.main([*options, *where, "--out", str(tmp_path / name)])
    assert (tmp_path / "one" / "results.json").read_bytes() == (tmp_path / "two" / "results.json").read_bytes()
    assert (tmp_path / "one" / "answers.jsonl").read_bytes() == (tmp_path / "two" / "answers.jsonl").read_bytes()
    # Golden can't answer.
    assert len(json.loads((tmp_path / "two" / "results.json").read_text())) == 5 * 4 + 5 * 3


class Mortal(Replica):
    """A replica that is killed in the middle of its rollouts, once."""

    note: Path

    def share(self, told: Broadcast, part: int) -> Share:
        """Make a share; in the second update the one that makes part 1 doesn't live to see it."""
        if (told.done, told.epoch, part) == (1, self.epoch, 1) and not self.note.exists():
            self.note.touch()
            play = self.learner.episodes.__class__.play

            def dying(*args: Any, **options: Any) -> Any:
                threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
                return play(*args, **options)

            self.learner.episodes.__class__.play = dying  # type: ignore[method-assign]
        return super().share(told, part)

    epoch = 0


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_worker_killed_in_its_rollouts_changes_nothing(
    epoch: int, cluster: None, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "killed"

    def mortal(*args: Any) -> Mortal:
        made = Mortal(*args)
        made.note, made.epoch = note, epoch
        return made

    options = [*GRPO, "--epochs", str(1 + epoch)]
    if epoch:
        train.main([*options, "--at-once", "1", "--out", str(tmp_path / "alone")])
    monkeypatch.setattr(replicas, "Replica", mortal)
    with pytest.warns(UserWarning, match=r"worker 1 died and was replaced"):
        train.main([*options, *OF_TWO, "--out", str(tmp_path / "run")])
    assert note.exists()
    assert_same_run(tmp_path / "alone" if epoch else alone, tmp_path / "run")


def test_a_killed_driver_goes_on_bit_for_bit(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    driver = subprocess.Popen([*command, *GRPO, *OF_TWO, "--out", str(out)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoints/*/state.json")) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    assert len(read_metrics(out)) < 4, "it was killed too late to tell anything"
    subprocess.run([*command, "--resume", str(out)], env=environment, check=True, timeout=300)
    assert_same_run(alone, out)


@pytest.mark.parametrize("another", [False, True])
def test_a_lost_node_does_not_end_the_run(
    another: bool, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lose one of two nodes, with room for a worker each; another node comes in its place, or none."""
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(crew, "PATIENCE", 100.0 if another else 20.0)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    update, replace = replicas.Replicas.update, crew.Crew._replace

    def losing(self: replicas.Replicas) -> dict[str, float]:
        if self.learner.done == 1:
            threading.Timer(0.3, cluster.remove_node, (node,), {"allow_graceful": False}).start()
        return update(self)

    def replaced(*args: Any) -> None:
        if another:
            cluster.add_node(num_cpus=1)
        replace(*args)

    monkeypatch.setattr(replicas.Replicas, "update", losing)
    monkeypatch.setattr(crew.Crew, "_replace", replaced)
    try:
        with pytest.warns(UserWarning, match="died and was replaced" if another else "no other came up"):
            train.main([*GRPO, "--ray", cluster.address, "--workers", "2", "--out", str(tmp_path / "run")])
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert_same_run(alone, tmp_path / "run")
