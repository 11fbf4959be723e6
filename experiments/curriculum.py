"""The lessons on which the bundled LLM is pretrained, easy ones first.

Retrieval over long text is not learned from long text: the model settles on copying some recent value. It is learned in
minutes when bare name-value pairs come first, then pairs with words around them, then text that grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvenv.traces import FAMILIES
from kvenv.traces.draw import Draw
from kvenv.traces.family import FamilySource
from kvenv.traces.source import Encoder
from kvenv.traces.words import Pool

PLAIN, ANSWER, IGNORED = 0, 1, 2  # kinds of target tokens


@dataclass(frozen=True)
class Batch:
    """Token ids (N, T) int64, the kind of each as a target (N, T) int8, and the rows' family (N,), -1 for pairs."""

    tokens: np.ndarray
    kinds: np.ndarray
    family: np.ndarray


@dataclass(frozen=True)
class Lesson:
    """One stage: batches of ``make(rng, tokenizer, rows)`` until the running answer accuracy passes ``until``.

    ``lengths`` are the trace lengths that it draws from, ``steps`` the most that it takes.
    """

    name: str
    lengths: tuple[int, ...]
    make: Callable[[Draw, object, int, int], Batch]
    steps: int
    until: float


def pairs(count: int, marked: bool) -> Callable[[Draw, object, int, int], Batch]:
    """Return a maker of ``count`` name-value pairs, told once and then twice more in random order.

    Only the repeated values are targets. ``marked`` puts words around the pairs.
    """

    def make(rng: Draw, tokenizer: object, rows: int, length: int) -> Batch:
        encoder = Encoder(tokenizer)
        tokens, kinds = [], []
        for _ in range(rows):
            pool, recent = Pool.draw(rng, "train"), dict[str, None]()
            told = [(pool.fresh(rng, recent), pool.fresh(rng, recent)) for _ in range(count)]
            ids, marks = list(encoder.start), [IGNORED] * len(encoder.start)
            for repeat, order in enumerate((told, rng.some(told, count), rng.some(told, count))):
                for name, value in order:
                    for word in (name, "is", value, ".") if marked else (name, value):
                        word_ids = encoder.word(word)
                        ids += word_ids
                        marks += [ANSWER if repeat and word is value else IGNORED] * len(word_ids)
            tokens.append(ids)
            kinds.append(marks)
        return Batch(np.array(tokens), np.array(kinds, dtype=np.int8), np.full(rows, -1))

    return make


def text(rng: Draw, tokenizer: object, rows: int, length: int) -> Batch:
    """Make traces of ``length`` tokens, every family alike; answers are targets of kind ANSWER, the rest PLAIN."""
    sources = [
        FamilySource(family, split="train", tokenizer=tokenizer, trace_length=length, schedule="periodic")
        for family in FAMILIES.values()
    ]
    tokens = np.empty((rows, length), dtype=np.int64)
    kinds = np.full((rows, length), PLAIN, dtype=np.int8)
    family = np.arange(rows) % len(sources)
    for row in range(rows):
        trace = sources[family[row]].make(int(rng.random() * 2**48))
        tokens[row] = trace.tokens
        for start, stop in trace.answers:
            kinds[row, start:stop] = ANSWER
    return Batch(tokens, kinds, family)


def curriculum(scale: float, final_steps: int) -> list[Lesson]:
    """Return the lessons in order; ``scale`` multiplies the most steps that each but the last takes."""
    return [
        Lesson("6 pairs", (73,), pairs(6, False), round(2000 * scale), 0.95),
        Lesson("6 marked pairs", (109,), pairs(6, True), round(2000 * scale), 0.95),
        Lesson("12 marked pairs", (217,), pairs(12, True), round(2000 * scale), 0.95),
        Lesson("text of 128", (128,), text, round(3000 * scale), 0.95),
        Lesson("text of 256", (256,), text, round(4000 * scale), 0.95),
        Lesson("text of 512", (512,), text, round(4000 * scale), 0.95),
        Lesson("text of 512 and 1024", (512, 512, 512, 1024), text, final_steps, 2.0),
    ]
