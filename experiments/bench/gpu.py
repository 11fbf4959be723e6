"""What one large GPU is to reach: random weights in the shapes of Qwen3-4B and Qwen2.5-7B, bfloat16, budget 1,024.

Decoding at batch 1 beside the bytes it must read, an eviction beside the decoding of its window, throughput beside the
full cache's, and a step of the environment at batch 64 beside a bare forward. All forwards are captured in CUDA graphs,
evictions at batch 1 and in the environment as well.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

import kvenv
from agents.scorer import Scorer, ScorerPolicy
from experiments.bench.machine import Machine, measure
from experiments.bench.measure import Row, Side, alternate, compare
from experiments.bench.memory import peak
from experiments.bench.models import RANDOM, SHAPES, in_shape, register_random_traces, work
from experiments.bench.step import captured_forward, stepping
from experiments.bench.tokens import EvictingTokens, StaticTokens, full_tokens
from kvenv.attention import HandedCache
from kvenv.features import feature_set
from kvenv.graphs import Graphs
from kvenv.vector_env import KVEvictVectorEnv

FEATURES, HIDDEN = "pre-rope", 64
"""Of the scorer: those that the bundled policies have."""
IN_ENVIRONMENT = "Qwen2.5-7B"
"""The model that the environment is measured with: the other one's observations are twice as large."""
PILOT = {"EvictingCache": 16, "full cache": 1}
"""Rows of which memory is measured before the largest batch is tried."""
FREE = 0.95
"""Share of the free memory that a batch is to take."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: by default the targets."""

    budget: int = 1024
    interval: int = 128
    rows: int = 64
    """Of the environment."""
    lengths: tuple[int, ...] = (128, 8192, 16_384, 24_576, 32_768)
    """Of the full cache: where a token is timed, from about nothing to all that is generated."""
    repeats: int = 5


def rows(device: str) -> Iterator[Row]:
    """Measure."""
    if not device.startswith("cuda"):
        raise ValueError(f"section 'gpu' measures a GPU, not {device!r}: take --device cuda")
    machine, sizes = measure(device, torch.bfloat16), Sizes()
    # What the environment decodes with stays registered: it comes last, and has memory left to be measured by.
    for name in sorted(SHAPES, key=IN_ENVIRONMENT.__eq__):
        model = in_shape(name, device)
        policy = scorer(model)
        yield from decoding(name, model, policy, machine, sizes, device)
        yield from throughput(name, model, policy, sizes, device)
        if name == IN_ENVIRONMENT:
            yield from environment(name, model, sizes, device)


def scorer(model: PreTrainedModel) -> ScorerPolicy:
    """Return a policy like the bundled ones, with random weights for a model."""
    shape, features = HandedCache(model), feature_set(FEATURES)
    width = features.width(shape.head_dim, shape.groups)
    network = Scorer(shape.num_layers, shape.kv_heads, width, HIDDEN, generator=torch.Generator().manual_seed(0))
    return ScorerPolicy(network.to(model.device), FEATURES)


def decoding(
    name: str, model: PreTrainedModel, policy: ScorerPolicy, machine: Machine, sizes: Sizes, device: str
) -> Iterator[Row]:
    """Measure a decode loop at batch 1 beside transformers' static cache, and the evictions in it, captured and not."""
    budget, interval = sizes.budget, sizes.interval
    ours, eager = (
        EvictingTokens(model, policy, rows=1, budget=budget, interval=interval, captured=captured)
        for captured in (True, False)
    )
    static = StaticTokens(model, budget, budget + interval)
    eviction, window, loop = "features, scorer and eviction", f"decoding {interval:,} tokens", "EvictingCache"
    sides: dict[str, Side] = {
        eviction: ours.evict, window: ours.decode, "StaticCache": lambda: static.decode(interval),
        f"{eviction}, not captured": eager.evict, f"{window} after that": eager.decode,
    }  # fmt: skip
    times = alternate(sides, sizes.repeats, warmup=3, device=device)
    times[loop] = times[eviction] + times[window]
    case = f"{name}, batch 1, budget {budget:,}"
    moved, computed = np.sum([work(model, 1, 1, budget + number) for number in range(interval)], axis=0)
    floor = machine.floor(moved, computed)
    yield compare("gpu", case, times, loop, "StaticCache", amount=interval, floor=floor)
    yield share(case, moved / float(np.median(times[loop])), machine.bytes_per_second)
    yield compare("gpu", case, times, eviction, window, target="<= 0.015")
    yield compare("gpu", case, times, f"{eviction}, not captured", window)
    yield from captures(case, loop, ours.graphs)
    yield from captures(case, "StaticCache", static.graphs)
    if ours.cache.graphs is not None:
        yield from captures(case, "eviction", ours.cache.graphs)


def share(case: str, bytes_per_second: float, copied: float) -> Row:
    """Return how fast weights, keys and values are read, as a share of the measured copy bandwidth."""
    what = "weights, keys and values / copy bandwidth"
    ratio = bytes_per_second / copied
    return Row("gpu", case, what, bytes_per_second / 1e9, "GB/s", copied / 1e9, ratio, target=">= 0.7")


def captures(case: str, what: str, graphs: Graphs) -> Iterator[Row]:
    """Return what it took to capture."""
    yield Row("gpu", case, f"warm-up, {what}", 1e3 * graphs.warm_up_seconds, "ms")
    yield Row("gpu", case, f"capture, {what}", 1e3 * graphs.capture_seconds, "ms")


def throughput(name: str, model: PreTrainedModel, policy: ScorerPolicy, sizes: Sizes, device: str) -> Iterator[Row]:
    """Measure tokens per second at the largest batches, under a budget and with the full cache.

    Under a budget every window costs the same: some are timed, over random pairs, each with its eviction. With the
    full cache a token is timed at every one of ``sizes.lengths``, over random pairs in buffers of the last length, and
    what lies between is taken to be linear. The largest batch is what the free memory holds by the rows of a pilot,
    and a tenth less as often as it doesn't.
    """
    attempts: dict[str, Callable[[int], float]] = {
        "EvictingCache": partial(evicting_rate, model, policy, sizes, device),
        "full cache": partial(full_rate, model, sizes, device),
    }
    (many, ours), (few, full) = (largest(attempt, PILOT[what], device) for what, attempt in attempts.items())
    case = f"{name}, {sizes.lengths[-1]:,} tokens"
    yield Row("gpu", case, "EvictingCache / full cache", ours, "tokens/s", full, ours / full, target=">= 10")
    yield Row("gpu", case, "largest batch", many, "rows", few, many / few)


def evicting_rate(model: PreTrainedModel, policy: ScorerPolicy, sizes: Sizes, device: str, rows: int) -> float:
    """Return tokens per second of so many rows under a budget."""
    tokens = EvictingTokens(model, policy, rows=rows, budget=sizes.budget, interval=sizes.interval)
    times = alternate({"eviction": tokens.evict, "window": tokens.decode}, 2, warmup=1, device=device)
    return rows * sizes.interval / float(np.median(times["eviction"] + times["window"]))


def full_rate(model: PreTrainedModel, sizes: Sizes, device: str, rows: int) -> float:
    """Return tokens per second of so many rows with all pairs cached, from the first token to the last."""
    shape = HandedCache(model)
    size = (2, rows, shape.kv_heads, sizes.lengths[-1], shape.head_dim)
    pairs = [torch.randn(size, dtype=model.dtype, device=device) for _ in range(shape.num_layers)]
    sides = {str(length): full_tokens(model, pairs, length).next for length in sizes.lengths}
    times = alternate(sides, sizes.repeats, device=device)
    return rows / mean_between(sizes.lengths, [float(np.median(times[str(length)])) for length in sizes.lengths])


def mean_between(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the mean from the first length to the last of what is linear between those measured."""
    trapezoids = np.diff(lengths) * (np.array(seconds[1:]) + np.array(seconds[:-1])) / 2
    return float(trapezoids.sum() / (lengths[-1] - lengths[0]))


def largest(attempt: Callable[[int], float], pilot: int, device: str) -> tuple[int, float]:
    """Return the most rows that memory holds and what comes of an attempt with them."""
    per_row = peak(partial, attempt, pilot, device=device) / pilot
    rows = max(1, int(FREE * free() / per_row))
    while True:
        try:
            return rows, attempt(rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows = max(1, int(0.9 * rows))
        free()


def free() -> int:
    """Return the bytes of the GPU that nothing takes, after giving back what is only kept for later."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def environment(name: str, model: PreTrainedModel, sizes: Sizes, device: str) -> Iterator[Row]:
    """Measure captured steps of the environment beside a captured forward of as many tokens over as many pairs."""
    register_random_traces()
    kvenv.register_model(f"bench-{name}", model)
    budget, interval, rows = sizes.budget, sizes.interval, sizes.rows
    env = KVEvictVectorEnv(
        num_envs=rows, model=f"bench-{name}", traces=RANDOM, budget=budget, interval=interval, features="kv",
        output="torch", autoreset_mode="SameStep", trace_length=budget + interval * (sizes.repeats + 6),
        device=device, cuda_graph=True,
    )  # fmt: skip
    env.reset(seed=0)
    ours, bare = "step, captured", "bare forward, captured"
    tokens = torch.randint(model.config.vocab_size, (rows, budget + interval), device=device)
    sides = {ours: stepping(env), bare: captured_forward(model, tokens, budget)}
    times = alternate(sides, sizes.repeats, device=device)
    case = f"{name} in the environment, batch {rows:,}"
    yield compare("gpu", case, times, ours, bare, amount=rows * interval, target=">= 0.9")
    if env.dynamics.graphs is not None:
        yield from captures(case, "step", env.dynamics.graphs)
    env.close()
