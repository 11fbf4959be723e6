"""Small environments for the tests: a random float64 LLM, random traces of several lengths, tight budgets."""

from __future__ import annotations

from typing import Any

import numpy as np

import kvenv
from kvenv.env import KVEvictEnv
from kvenv.registry import MODELS, TRACES
from kvenv.state import Protection
from kvenv.traces import Trace
from kvenv.vector_env import KVEvictVectorEnv
from tests.models import random_model

MODEL, RAGGED = "random-float64", "ragged"
LENGTH, BUDGET, INTERVAL, SINKS, RECENT = 60, 20, 6, 2, 4
PROTECTION = Protection(SINKS, RECENT)


def ragged(trace_id: int, *, split: str, trace_length: int, tokenizer: Any) -> Trace:
    """Return a random trace; lengths, prompts and answers differ by id."""
    length = trace_length - 5 * (trace_id % 3)
    tokens = np.random.default_rng([len(split), trace_id]).integers(3, 64, length)
    return Trace(tokens, 30 + trace_id % 3, ((35, 38), (44, 45)), f"ragged/{split}/{trace_id}")


def register() -> None:
    """Make the model and the traces known, once."""
    if MODEL not in MODELS:
        kvenv.register_model(MODEL, random_model())
    if RAGGED not in TRACES:
        kvenv.register_traces(RAGGED, ragged)


register()

ARGUMENTS: dict[str, Any] = {
    "model": MODEL,
    "traces": RAGGED,
    "trace_length": LENGTH,
    "budget": BUDGET,
    "interval": INTERVAL,
    "sinks": SINKS,
    "recent": RECENT,
}


def single(**changes: Any) -> KVEvictEnv:
    """Return the single environment."""
    return KVEvictEnv(**{**ARGUMENTS, **changes})


def vector(num_envs: int = 3, **changes: Any) -> KVEvictVectorEnv:
    """Return the vector environment."""
    return KVEvictVectorEnv(num_envs, **{**ARGUMENTS, **changes})


def trace(trace_id: int, split: str = "train") -> Trace:
    """Return a trace as the environments see it."""
    return ragged(trace_id, split=split, trace_length=LENGTH, tokenizer=None)
