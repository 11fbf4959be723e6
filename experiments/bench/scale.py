"""Throughput over rows and trace lengths: once the cache is full, a token costs the same wherever it stands."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from gymnasium.utils.performance import benchmark_vector_step

from experiments.bench.machine import measure
from experiments.bench.measure import Row, alternate
from experiments.bench.memory import held
from experiments.bench.models import LARGE, RANDOM, large, register_random_traces, work
from experiments.bench.step import stepping
from kvenv.vector_env import KVEvictVectorEnv

ROWS = (1, 4, 16, 64)
LENGTHS = (1024, 32_768)
BUDGET, INTERVAL, SECONDS = 64, 16, 5
FLAT, FLAT_MEMORY = 1.1, 1.02


def rows(device: str) -> Iterator[Row]:
    """Measure."""
    register_random_traces()
    machine = measure(device)
    for count in ROWS:
        env = environment("tiny", count, 4096, device)
        env.reset(seed=0)
        seconds = float(np.median(alternate({"step": stepping(env)}, 30, device=device)["step"]))
        tokens = count * INTERVAL
        floor = tokens / machine.floor(*work(env.dynamics.model, count, INTERVAL, BUDGET))
        yield Row("scale", f"tiny, N = {count}", "in the environment", tokens / seconds, "tokens/s", floor=floor)
        env.close()
    env = environment("tiny", 16, 512, device)
    yield Row("scale", "tiny, N = 16", "benchmark_vector_step", benchmark_vector_step(env, SECONDS, 0), "steps/s")
    env.close()
    yield from flat(device)


def flat(device: str) -> Iterator[Row]:
    """Compare early and late steps of one long episode, and its memory."""
    large(device)
    env = environment(LARGE, 1, LENGTHS[1], device)
    env.reset(seed=0)
    step, seconds, memory = stepping(env), [], []
    windows = (LENGTHS[1] - 1 - BUDGET - INTERVAL) // INTERVAL
    for window in range(windows):
        began = time.perf_counter()
        if window in (LENGTHS[0] // INTERVAL, windows - 1):
            memory.append(held(device) / 2**20)
        step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    early, late = (1e3 * float(np.median(x)) for x in (seconds[16:64], seconds[-49:-1]))
    case = f"100m, tokens {LENGTHS[0]:,} and {LENGTHS[1]:,}"
    yield Row("scale", case, "late step / early step", late, "ms", early, late / early, target=f"<= {FLAT}")
    first, last = memory
    yield Row("scale", case, "memory late / early", last, "MiB", first, last / first, target=f"<= {FLAT_MEMORY}")
    env.close()


def environment(model: str, count: int, length: int, device: str) -> KVEvictVectorEnv:
    """Return an environment over random tokens."""
    return KVEvictVectorEnv(
        num_envs=count, model=model, traces=RANDOM, budget=BUDGET, interval=INTERVAL, output="torch",
        autoreset_mode="SameStep", trace_length=length, device=device,
    )  # fmt: skip
