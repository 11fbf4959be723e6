"""The heuristics' formulas, written a second time: one (row, head) at a time, tokens in order, float64, plain loops.

Nothing here is shared with ``agents``. A reference takes a :class:`Head` and returns {position: priority} of the
candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvenv.state import STATS, LayerState

Array = NDArray[np.float64]


@dataclass
class Head:
    """One (row, KV head) of a state: only its filled slots, in token order."""

    positions: list[int]
    candidate: list[bool]
    keys: Array
    values: Array
    stats: Array  # (G, n, 8)
    last_attention: Array  # (G, n)
    queries: Array  # (G, m, D), valid ones only, oldest first
    query_mean: Array  # (G, D)
    query_cov: Array  # (G, D, D)
    inv_freq: Array
    scaling: float
    future: Array
    expected_future: Array
    noise: Array
    next_position: int
    prompt_length: int
    budget: int
    interval: int

    @property
    def group(self) -> int:
        return self.stats.shape[0]

    def stat(self, name: str, i: int) -> float:
        """Return a statistic of the i-th token, averaged over the group."""
        return sum(self.stats[g, i, STATS.index(name)] for g in range(self.group)) / self.group


def head_of(state: LayerState, row: int, head: int) -> Head:
    """Cut one (row, head) out of a state and forget its slots."""

    def pick(name: str, *index: object) -> Array:
        return getattr(state, name)[index].double().numpy()

    positions = state.positions[row, head].tolist()
    slots = sorted((s for s in range(len(positions)) if state.filled[row, head, s]), key=lambda s: positions[s])
    assert state.query_valid is not None
    assert state.rotary is not None
    valid = state.query_valid[row].numpy()
    return Head(
        positions=[positions[s] for s in slots],
        candidate=[bool(state.mask[row, head, s]) for s in slots],
        keys=pick("keys", row, head)[slots],
        values=pick("values", row, head)[slots],
        stats=pick("stats", row, head)[:, slots],
        last_attention=pick("last_attention", row, head)[:, slots],
        queries=pick("queries", row, head)[:, valid],
        query_mean=pick("query_mean", row, head),
        query_cov=pick("query_cov", row, head),
        inv_freq=state.rotary.inv_freq.double().numpy(),
        scaling=state.rotary.scaling,
        future=pick("future", row, head)[slots],
        expected_future=pick("expected_future", row, head)[slots],
        noise=pick("noise", row, head)[slots],
        next_position=int(state.next_position[row]),
        prompt_length=int(state.prompt_length[row]),
        budget=int(state.budget[row]),
        interval=state.interval,
    )


def softmax(x: list[float]) -> list[float]:
    exponentials = [math.exp(v - max(x)) for v in x]
    return [e / sum(exponentials) for e in exponentials]


def around(x: list[float], i: int, kernel: int) -> list[float]:
    return [x[j] if 0 <= j < len(x) else 0.0 for j in range(i - kernel // 2, i + kernel // 2 + 1)]


def older_than_last(head: Head, window: int) -> int:
    """Return how many cached tokens are older than the last min(window, interval) positions."""
    return sum(p < head.next_position - min(window, head.interval) for p in head.positions)


def random(head: Head) -> list[float]:
    return list(head.noise)


def random_prompt(head: Head) -> list[float]:
    return [1 + u if p < head.prompt_length else u for p, u in zip(head.positions, head.noise)]


def streaming(head: Head) -> list[float]:
    return [float(p) for p in head.positions]


def h2o(head: Head) -> list[float]:
    return [head.stat("cumulative", i) for i in range(len(head.positions))]


def snapkv(head: Head) -> list[float]:
    n = older_than_last(head, 32)
    votes = [head.stat("sum32", i) for i in range(n)]
    return [sum(around(votes, i, 5)) / 5 for i in range(n)] + [32.0] * (len(head.positions) - n)


def tova(head: Head) -> list[float]:
    return [float(np.mean([head.last_attention[g, i] for g in range(head.group)])) for i in range(len(head.positions))]


def knorm(head: Head) -> list[float]:
    return [-math.sqrt(sum(x * x for x in key)) for key in head.keys]


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def keydiff(head: Head) -> list[float]:
    anchor = np.zeros(head.keys.shape[1])
    for key in head.keys:
        anchor += key / math.sqrt(key @ key) / len(head.keys)
    return [-cosine(key, anchor) for key in head.keys]


def lagkv(head: Head) -> list[float]:
    n, lag = len(head.positions), head.interval
    stops = list(range(n, 0, -lag))
    partitions = [list(range(max(stop - lag, 0), stop)) for stop in reversed(stops)]
    priority = [1.0] * n
    for partition, successor in pairwise(partitions):
        members = [i for i in partition if head.candidate[i]]
        if not members:
            continue
        total = [0.0] * len(members)
        for x in (head.keys, head.values):
            spreads = []
            for i in members:
                z = []
                for c in range(x.shape[1]):
                    column = [x[j, c] for j in successor]
                    z.append((x[i, c] - min(column)) / (max(column) - min(column)))
                mean = sum(z) / len(z)
                spreads.append(math.sqrt(sum((v - mean) ** 2 for v in z) / (len(z) - 1)))
            total = [t + s for t, s in zip(total, softmax(spreads))]
        for t, i in zip(total, members):
            priority[i] = sum(other < t for other in total) / len(members)
    return priority


def rkv(head: Head) -> list[float]:
    n, total = older_than_last(head, 8), len(head.positions)
    observers = head.queries[:, -8:]
    importance = [0.0] * n
    for t in range(observers.shape[1]):
        logits = []
        for i in range(n):
            dots = [float(observers[g, t] @ head.keys[i]) for g in range(head.group)]
            logits.append(max(dots) / math.sqrt(head.keys.shape[1]))
        for i, a in enumerate(softmax(logits)):
            importance[i] += a / observers.shape[1]
    pooled = [max(around(importance, i, 7)) for i in range(n)] + [1.0] * (total - n)

    similarity = [[0.0 if i == j else cosine(head.keys[i], head.keys[j]) for j in range(total)] for i in range(total)]
    for row in similarity:
        similar = [j for j in range(total) if row[j] > 0.5]
        if similar:
            row[similar[-1]] = 0.0
    redundancy = softmax([sum(row[j] for row in similarity) / total for j in range(total)])
    return [0.1 * a - 0.9 * b for a, b in zip(pooled, redundancy)]


def expected_attention(head: Head) -> list[float]:
    size, half = head.keys.shape[1], len(head.inv_freq)
    rotation = np.zeros((size, size))
    for t in range(head.next_position, head.next_position + 512):
        at_t = np.eye(size)
        for f in range(half):
            cos, sin = math.cos(t * head.inv_freq[f]) * head.scaling, math.sin(t * head.inv_freq[f]) * head.scaling
            at_t[f, f], at_t[f, f + half], at_t[f + half, f], at_t[f + half, f + half] = cos, -sin, sin, cos
        rotation += at_t / 512
    expected = [0.0] * len(head.positions)
    for g in range(head.group):
        mean, cov = rotation @ head.query_mean[g], rotation @ head.query_cov[g] @ rotation.T
        logits = [float(mean @ k / math.sqrt(size) + k @ cov @ k / (2 * size)) for k in head.keys]
        expected = [e + a / head.group for e, a in zip(expected, softmax(logits))]
    return [e * math.sqrt(v @ v) for e, v in zip(expected, head.values)]


def vase(head: Head) -> list[float]:
    n = older_than_last(head, 32)
    attention = [head.stat("sum32", i) for i in range(n)] + [0.0] * (len(head.positions) - n)
    pooled = [sum(around(attention, i, 5)) / 5 for i in range(len(attention))]
    priority = [math.log(max(p, 1e-300)) - math.log(-math.log(u)) for p, u in zip(pooled, head.noise)]
    candidates = [i for i, candidate in enumerate(head.candidate) if candidate]
    spread = [max(v) - min(v) for v in head.values]
    quarter = math.floor(0.25 * (head.budget - (len(head.positions) - len(candidates))))
    by_spread = sorted(candidates, key=lambda i: -spread[i])
    top = max([0.0] + [priority[i] for i in candidates]) + 1
    for i in by_spread[:quarter] + list(range(n, len(head.positions))):
        priority[i] = top + spread[i]
    return priority


def golden(head: Head) -> list[float]:
    return list(head.future)


def golden_expected(head: Head) -> list[float]:
    return list(head.expected_future)


REFERENCES = {
    "random": random,
    "random-prompt": random_prompt,
    "streaming": streaming,
    "h2o": h2o,
    "snapkv": snapkv,
    "tova": tova,
    "knorm": knorm,
    "keydiff": keydiff,
    "lagkv": lagkv,
    "r-kv": rkv,
    "expected-attention": expected_attention,
    "vase": vase,
    "golden": golden,
    "golden-expected": golden_expected,
}
