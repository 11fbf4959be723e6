"""The soak finds what leaks, and what kvenv makes is gone when it is dropped."""

from __future__ import annotations

import gc
import json
import mmap
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch

import agents
import kvenv
from experiments.record import Args as RecordArgs
from experiments.record import record_store
from experiments.soak import __main__ as command
from experiments.soak import rounds
from experiments.soak.environments import INTERVAL, LENGTH
from experiments.soak.held import Change, measures
from experiments.soak.restarts import RESTARTS
from experiments.soak.rounds import PHASES, SHARES, Round, soak
from kvenv import models
from kvenv.attention import use_kvenv_attention
from kvenv.identity import fingerprint
from kvenv.store import TraceStore
from tests.environments import INTERVAL as SMALL_INTERVAL
from tests.environments import single, trace, vector
from tests.models import random_model, random_tokens

kept: list[Any] = []
"""What leaking phases don't let go."""


def let_go() -> None:
    for thing in kept:
        if isinstance(thing, subprocess.Popen):
            thing.kill()
            thing.wait()
        elif isinstance(thing, threading.Timer):
            thing.cancel()
            thing.join()
        elif hasattr(thing, "close"):
            thing.close()
    kept.clear()


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    yield
    let_go()


def thread(now: Round) -> threading.Timer:
    waiting = threading.Timer(600, print)
    waiting.start()
    return waiting


def child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", code])


def unreaped(now: Round) -> subprocess.Popen[bytes]:
    process = child("")
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        pass
    return process


def mapped(now: Round) -> mmap.mmap:
    path = now.directory / f"{now.number}.safetensors"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        made = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    path.unlink()
    return made


LEAKS: dict[str, tuple[Callable[[Round], Any], str]] = {
    "memory": (lambda now: bytearray(b"x" * 50_000_000), "resident MB"),
    "blocks": (lambda now: [str(number) for number in range(100_000)], "blocks k"),
    "tensor": (lambda now: torch.zeros(1), "tensors"),
    "file": (lambda now: (now.directory / str(now.number)).open("w"), "files"),
    "thread": (thread, "threads"),
    "child": (lambda now: child("import time; time.sleep(600)"), "children"),
    "unreaped child": (unreaped, "children"),
    "deleted file": (mapped, "maps"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_what_a_phase_does_not_let_go_is_found(name: str, tmp_path: Path) -> None:
    leak, measure = LEAKS[name]

    def leaks(now: Round) -> int:
        kept.append(leak(now))
        return 1

    soaked = soak({"leaks": leaks}, steps=3, rounds=3, directory=tmp_path, device="cpu")
    assert measure in soaked.grown("leaks")
    assert soaked.leaking == ["leaks"]


def test_what_a_phase_lets_go_is_not_held(tmp_path: Path) -> None:
    def lets_go(now: Round) -> int:
        kept.extend(leak(now) for leak, _ in LEAKS.values())
        let_go()
        return 1

    soaked = soak({"lets go": lets_go}, steps=3, rounds=3, directory=tmp_path, device="cpu")
    assert soaked.leaking == []


def test_a_change_is_that_of_quarters_after_the_warm_up() -> None:
    warm, rest = [0, 1000, 5, 7], [10, 11, 90, 1, 2, 3, 4, 5, 6, 14, 0, 12]
    assert Change.of([*warm, *rest]) == Change(11, 12)
    assert Change.of([*warm, *rest]).relative == pytest.approx(1 / 11)
    assert Change.of([9, 4, 4]).relative == 0
    assert Change.of([9, 0, 1]).relative == float("inf")
    with pytest.raises(ValueError, match="2 samples are too few"):
        Change.of([1, 2])


def test_the_steps_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "read", lambda measured: [0] * len(measured))
    asked: dict[str, list[int]] = {name: [] for name in ("single", "vector", "generate")}

    def counts(name: str) -> Callable[[Round], int]:
        def phase(now: Round) -> int:
            asked[name].append(now.steps)
            return now.steps

        return phase

    phases = {name: counts(name) for name in asked}
    soaked = soak(phases, steps=600, rounds=4, directory=tmp_path, device="cpu")
    assert asked == {"single": [25] * 4, "vector": [125] * 4, "generate": [0] * 4}
    assert soaked.steps.sum() == 600
    assert sum(SHARES.values()) == pytest.approx(1)


def test_the_command_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        command, "PHASES", {"leak": lambda now: kept.append(torch.zeros(3)) or 2, "rest": lambda now: 1}
    )
    with pytest.raises(SystemExit) as stopped:
        command.main(["--rounds", "3", "--out", str(tmp_path)])
    assert stopped.value.code == 1
    text = (tmp_path / "soak.txt").read_text()
    assert text in capsys.readouterr().out
    assert "not flat after leak: tensors" in text
    assert "not flat after rest: tensors" in text
    assert "9 environment steps, 3 rounds; " in text
    assert text.endswith(": NOT FLAT\n")
    told = json.loads((tmp_path / "soak.json").read_text())
    tensors = told["rounds"]["leak"]["tensors"]
    assert [later - earlier for earlier, later in pairwise(tensors)] == [1, 1]
    assert told["rounds"]["rest"]["steps"] == [1, 1, 1]


def test_the_command_refuses_what_cannot_be_soaked() -> None:
    with pytest.raises(ValueError, match="unknown phase 'nothing': known are single, "):
        command.main(["--phases", "nothing"])
    with pytest.raises(ValueError, match="rounds 2 is impossible: it must be at least 3"):
        command.main(["--rounds", "2"])
    with pytest.raises(ValueError, match="steps 0 is impossible"):
        command.main(["--steps", "0"])


def test_a_small_soak_is_flat(tmp_path: Path) -> None:
    phases = ("vector", "snapshots", "rank", "mistakes", "kvp")
    command.main(["--steps", "300", "--rounds", "3", "--out", str(tmp_path), "--phases", *phases])
    assert (tmp_path / "soak.txt").read_text().endswith("flat\n")


@pytest.mark.slow
def test_a_small_soak_of_everything_is_flat(tmp_path: Path) -> None:
    """In a process of its own: the models that it loads drive the others' out of the process-level cache."""
    arguments = ["--steps", "600", "--rounds", "3", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "experiments.soak", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "soak.json").read_text())
    assert set(told["rounds"]) == set(PHASES) > set(RESTARTS)
    assert sum(sum(phase["steps"]) for phase in told["rounds"].values()) >= 600


def gone(*dropped: weakref.ref[Any]) -> bool:
    """Return whether nothing refers to any of them any more."""
    gc.collect()
    return all(reference() is None for reference in dropped)


def test_a_model_that_is_dropped_is_freed() -> None:
    model = random_model.__wrapped__(dtype=torch.float32)  # of which tests' cache knows nothing
    use_kvenv_attention(model)
    fingerprint(model)
    policy, terms = agents.make("h2o"), {"budget": 16, "interval": 4}
    kvenv.rollout(policy, [trace(0)], model=model, **terms)
    cache = kvenv.EvictingCache(model, policy, **terms)
    prompt = random_tokens(2, 30)
    model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=8)
    references = weakref.ref(model), weakref.ref(model.get_input_embeddings().weight), weakref.ref(cache)
    assert not gone(*references)
    del model, cache
    assert gone(*references)


def test_a_rollout_that_breaks_off_leaves_no_cache_behind() -> None:
    held: list[weakref.ref[Any]] = []

    class Breaking(agents.Policy):
        name = "breaking"

        def __call__(self, state: kvenv.LayerState) -> torch.Tensor:
            held.append(weakref.ref(state.keys))
            raise FloatingPointError("no priorities")

    loaded = kvenv.load_model("tiny")
    with pytest.raises(FloatingPointError):
        kvenv.rollout(Breaking(), [trace(0)], model=loaded.model, budget=16, interval=4)
    assert held
    assert gone(*held)


def test_no_more_models_are_kept_than_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models._load.cache_info().maxsize == models.KEPT
    # One of its own, or the models of other tests would go.
    monkeypatch.setattr(models, "_load", lru_cache(models.KEPT)(models._load.__wrapped__))
    loaded = []
    for number in range(models.KEPT + 2):
        shutil.copytree(models.TINY, tmp_path / str(number))
        loaded.append(weakref.ref(kvenv.load_model(str(tmp_path / str(number))).model))
    assert gone(*loaded[:2])
    assert all(reference() is not None for reference in loaded[2:])


def test_an_environment_that_is_dropped_is_freed() -> None:
    env, vec = single(full_metrics=True), vector(3, autoreset_mode="SameStep", reward="foresight")
    heads = kvenv.HeadView(vec)
    env.reset(seed=0)
    heads.reset(seed=0)
    for _ in range(SMALL_INTERVAL):
        vec.step(vec.action_space.sample())
    snapshot = vec.snapshot()
    vec.restore(snapshot)
    kvenv.GoldenExpert(env).action()
    references = [weakref.ref(x) for x in (env, vec, heads, env.vector.dynamics, vec.dynamics, vec.dynamics.cache)]
    del env, vec, heads, snapshot
    assert gone(*references)


def test_a_store_that_is_dropped_is_not_mapped_any_more(tmp_path: Path) -> None:
    record_store(RecordArgs(out=tmp_path, num_traces=4, batch_size=2, trace_length=LENGTH, interval=INTERVAL))
    maps, files = (measures("cpu")[name].read for name in ("maps", "files"))
    before = maps(), files()
    store = TraceStore(tmp_path)
    env = gymnasium.make("KVRank-v0", store=str(tmp_path))
    env.reset(seed=0)
    assert maps() > before[0]
    assert files() == before[1]
    del store, env
    gc.collect()
    assert (maps(), files()) == before
