"""The same bits in every run: two processes, environments and learners; on a GPU, too, where it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import pytest
import torch

import kvenv
from kvenv import determinism
from kvenv.determinism import set_deterministic
from tests.environments import single

ROOT = Path(__file__).resolve().parent.parent

STORY = """
import hashlib
import sys
import gymnasium as gym
import numpy as np
import torch
import kvenv
from agents.grpo import GRPOConfig, GRPOLearner
from agents.imitation import ImitationConfig, ImitationLearner
from agents.kvp import KVPConfig, KVPLearner
from agents.ppo import PPOConfig, PPOLearner
from kvenv.models import load_model
from kvenv.recording import sample
from kvenv.traces import load_traces

def digest(*arrays):
    digested = hashlib.sha256()
    for x in arrays:
        digested.update(np.ascontiguousarray(x).tobytes())
    return digested.hexdigest()[:16]

terms = dict(device=sys.argv[1], deterministic=sys.argv[2] == "on", budget=32, trace_length=128)
print(torch.are_deterministic_algorithms_enabled())
env = gym.make_vec("KVEvict-v0", num_envs=3, features="foresight", reward="foresight", **terms)
observation, _ = env.reset(seed=0)
env.action_space.seed(0)
print(torch.are_deterministic_algorithms_enabled())
seen = [*observation.values()]
for _ in range(8):
    observation, reward, *_ = env.step(env.action_space.sample())
    seen += [*observation.values(), reward]
print("env", digest(*seen))
if sys.argv[3] == "env":
    raise SystemExit

loaded = load_model("tiny", device=sys.argv[1])
source = load_traces("recall+tracking", tokenizer=loaded.tokenizer, trace_length=128)
small = dict(num_traces=2, hidden=4, budgets=(32,))
ppo = kvenv.KVEvictVectorEnv(2, autoreset_mode="SameStep", features="stats", **terms)
for learner in (
    ImitationLearner(loaded.model, source, ImitationConfig(**small)),
    GRPOLearner(loaded.model, source, GRPOConfig(**small, group=2, kl=0.1)),
    KVPLearner(sample(), KVPConfig(batch_size=2, samples=2, embedding=4, hidden=4), sys.argv[1]),
    PPOLearner(ppo, PPOConfig(epochs=1, hidden=4)),
):
    for _ in range(2):
        learner.update()
    print(learner.name, digest(*(x.cpu().numpy() for x in learner.state().tensors.values())))
"""
"""Prints digests of trajectories and of trained weights."""


def story(device: str, deterministic: str, *, of: str, **environment: str) -> list[str]:
    """Return what a process of its own prints, of the environment or of all."""
    told = subprocess.run(
        [sys.executable, "-c", STORY, device, deterministic, of],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    return told.stdout.splitlines()


@pytest.mark.parametrize("of", ["env", pytest.param("all", marks=pytest.mark.slow)])
def test_two_processes_compute_the_same_bits(of: str) -> None:
    one = story("cpu", "off", of=of, PYTHONHASHSEED="1")
    other = story("cpu", "on", of=of, PYTHONHASHSEED="2")
    assert one[:2] == ["False", "False"]
    assert other[:2] == ["False", "True"]
    assert one[2:] == other[2:]
    told = ["env"] if of == "env" else ["env", "imitation", "grpo", "kvp", "ppo"]
    assert [line.split()[0] for line in one[2:]] == told
    assert len({line.split()[1] for line in one[2:]}) == len(told), "nothing is digested"


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put PyTorch's settings back."""
    monkeypatch.delenv(determinism.WORKSPACE, raising=False)
    yield
    set_deterministic(False)


@pytest.mark.usefixtures("restored")
def test_it_is_switched_on_by_an_argument_that_specs_hold() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    spec = gym.make("KVEvict-v0", deterministic=True).spec
    assert spec is not None
    assert spec.kwargs["deterministic"] is True
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ[determinism.WORKSPACE] == ":4096:8"
    single()
    assert torch.are_deterministic_algorithms_enabled(), "an environment without it switches nothing off"
    kvenv.set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.usefixtures("restored")
def test_what_makes_it_a_lie_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(determinism.WORKSPACE, ":0:0")
    with pytest.raises(ValueError, match=r"CUBLAS_WORKSPACE_CONFIG ':0:0' lets cuBLAS vary: choose :4096:8 or :16:8"):
        set_deterministic()
    monkeypatch.delenv(determinism.WORKSPACE)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="CUDA is in use already"):
        set_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(determinism.WORKSPACE, ":16:8")
    set_deterministic()
    assert os.environ[determinism.WORKSPACE] == ":16:8"


def test_specs_say_that_environments_are_deterministic() -> None:
    assert not gym.spec("KVEvict-v0").nondeterministic
    assert not gym.spec("KVRank-v0").nondeterministic
