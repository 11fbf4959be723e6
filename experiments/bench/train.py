"""What the learners spend their time on, and how many tokens they learn from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from agents.grpo import GRPOConfig, GRPOLearner
from agents.imitation import ImitationConfig, ImitationLearner
from agents.kvp import KVPConfig, KVPLearner
from agents.learner import Learner
from agents.ppo import PPOConfig
from experiments.bench.measure import Row
from experiments.learners import PPO, PaidArgs, RunArgs
from experiments.record import Args, record_store
from kvenv.models import load_model
from kvenv.store import TraceStore
from kvenv.traces import load_traces

FAMILIES = "recall+tracking+dialogue+reasoning"
UPDATES, TRACES = 3, 32
SHARES = ("time/env", "time/policy", "time/learn")


def rows(device: str) -> Iterator[Row]:
    """Measure updates of the default learners, on the bundled model."""
    loaded = load_model("tiny", device=device)
    source = load_traces(FAMILIES, split="train", tokenizer=loaded.tokenizer)
    imitation, grpo = ImitationLearner(loaded.model, source), GRPOLearner(loaded.model, source)
    yield from shares(imitation, ImitationConfig.num_traces * 512)
    yield from shares(grpo, GRPOConfig.num_traces * GRPOConfig.group * 512)
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        record_store(Args(out=store, num_traces=TRACES, device=device))
        yield from shares(KVPLearner(TraceStore(store), device=device), KVPConfig.batch_size * 512)
    ppo = PPO(PaidArgs(device=device), PPOConfig(), RunArgs())
    yield from shares(ppo.build(), ppo.env.num_envs * 512)


def shares(learner: Learner, tokens: int) -> Iterator[Row]:
    """Measure some updates of a learner, each of so many tokens."""
    learner.update()
    found = [learner.update() for _ in range(UPDATES)]
    parts = np.array([[metrics[part] for part in SHARES] for metrics in found])
    whole = float(np.median(parts.sum(axis=1)))
    yield Row("train", learner.name, "training", tokens / whole, "tokens/s")
    for name, seconds in zip(SHARES, np.median(parts, axis=0), strict=True):
        yield Row("train", learner.name, name, 1e3 * float(seconds), "ms", 1e3 * whole, float(seconds) / whole)
