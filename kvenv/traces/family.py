"""What a trace family is, and the endless, seeded source of traces that every family gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from kvenv.traces.draw import Draw
from kvenv.traces.source import Encoder, Trace, TraceSource
from kvenv.traces.words import FILLER, SPLITS, Phrasing, Pool

TRIES = 512  # sentences drawn at a cut in search of some that begin as the visible one does


@dataclass(frozen=True)
class Sentence:
    """Words in order, which of them are answers, and what the sentence does to facts.

    ``told`` is the id of the fact that it tells (None if it tells none), ``used`` are the ids of the facts that its
    answers follow from.
    """

    words: tuple[str, ...]
    answers: tuple[int, ...] = ()
    told: int | None = None
    used: tuple[int, ...] = ()


@dataclass
class State:
    """What a family knows while it tells a trace; subclasses add their own containers of immutable things."""

    pool: Pool
    header: Sentence
    recent: dict[str, None] = field(default_factory=dict)
    facts: int = 0

    def copy(self) -> Any:
        """Return a state that can go another way."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (list, dict, set)):
                setattr(other, name, value.copy())
        return other

    def word(self, rng: Draw) -> str:
        """Draw a made-up word that was not used recently."""
        return self.pool.fresh(rng, self.recent)

    def number(self) -> int:
        """Return the id of a new fact."""
        self.facts += 1
        return self.facts


class Family:
    """A kind of text with facts and questions. Subclasses give ``name``, ``tables``, ``start`` and ``sentence``.

    The next sentence may depend on what the text has shown so far and on nothing else (no hidden plan), so that
    resampled continuations are what a reader of the text could expect.
    """

    name: ClassVar[str]
    tables: ClassVar[dict[str, dict[str, list[Phrasing]]]]

    def start(self, rng: Draw, split: str) -> Any:
        """Return the state of a new trace, its header (the first sentence) included."""
        raise NotImplementedError

    def sentence(self, state: Any, rng: Draw) -> Sentence:
        """Draw the next sentence and change ``state`` accordingly."""
        raise NotImplementedError

    def say(
        self,
        kind: str,
        split: str,
        rng: Draw,
        *,
        told: int | None = None,
        used: tuple[int, ...] = (),
        **fills: str,
    ) -> Sentence:
        """Fill a phrasing of ``kind``; ``{v}`` is a told value, ``{V}`` a value that the reader should know."""
        words: list[str] = []
        answers = []
        for word in rng.pick(self.tables[kind][split]):
            if word[0] == "{":
                slot = word[1:-1]
                if slot.isupper():
                    answers.append(len(words))
                word = fills[slot.lower()]
            words.append(word)
        return Sentence(tuple(words), tuple(answers), told, used)

    def filler(self, split: str, rng: Draw) -> Sentence:
        """Draw a sentence that says nothing of use."""
        return Sentence(rng.pick(FILLER[split]))

    def sentences(self, rng: Draw, split: str) -> Iterator[Sentence]:
        """Tell a trace, header first, without end."""
        state = self.start(rng, split)
        yield state.header
        while True:
            yield self.sentence(state, rng)


class _Tokens:
    """A trace under construction."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.ids: list[int] = list(encoder.start)
        self.answers: list[tuple[int, int]] = []

    def add(self, sentence: Sentence) -> None:
        for index, word in enumerate(sentence.words):
            begin = len(self.ids)
            self.ids += self.encoder.word(word, first=not self.ids)
            if index in sentence.answers:
                self.answers.append((begin, len(self.ids)))

    def fork(self) -> _Tokens:
        other = _Tokens(self.encoder)
        other.ids, other.answers = self.ids.copy(), self.answers.copy()
        return other

    def trace(self, length: int, prompt_length: int, name: str) -> Trace:
        answers = tuple(span for span in self.answers if span[1] <= length)
        return Trace(np.array(self.ids[:length], dtype=np.int64), prompt_length, answers, name)


class FamilySource(TraceSource):
    """The traces of one family and split: any ``trace_id`` >= 0, each of exactly ``trace_length`` tokens.

    ``prompt_length`` is the header's under the schedule ``periodic`` and half of the trace under ``prefill``.
    """

    size = None

    def __init__(self, family: Family, *, split: str, tokenizer: Any, trace_length: int, schedule: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} of traces {family.name!r} is unknown: known are {', '.join(SPLITS)}")
        super().__init__(family.name, split)
        self.family = family
        self.trace_length = trace_length
        self.schedule = schedule
        self.encoder = Encoder(tokenizer)

    @property
    def max_prompt_length(self) -> int:
        """The longest prompt that a trace of this source can have, in tokens."""
        if self.schedule == "prefill":
            return self.trace_length // 2
        return max(self[trace_id].prompt_length for trace_id in range(32))

    def _rng(self, *key: object) -> Draw:
        return Draw(self.family.name, self.split, *key)

    def _prompt_length(self, header_length: int) -> int:
        return self.trace_length // 2 if self.schedule == "prefill" else min(header_length, self.trace_length)

    def sentences(self, trace_id: int) -> Iterator[tuple[Sentence, int, int]]:
        """Yield the sentences of a trace with their token spans [start, stop); the last one may run over the end."""
        tokens = _Tokens(self.encoder)
        start = 0
        for sentence in self.family.sentences(self._rng(trace_id), self.split):
            tokens.add(sentence)
            yield sentence, start, len(tokens.ids)
            start = len(tokens.ids)
            if start >= self.trace_length:
                return

    def make(self, trace_id: int) -> Trace:
        tokens = _Tokens(self.encoder)
        header_length = 0
        for sentence in self.family.sentences(self._rng(trace_id), self.split):
            tokens.add(sentence)
            header_length = header_length or len(tokens.ids)
            if len(tokens.ids) >= self.trace_length:
                break
        name = f"{self.name}/{self.split}/{trace_id}"
        return tokens.trace(self.trace_length, self._prompt_length(header_length), name)

    def continuations(self, trace_id: int, cut: int, count: int) -> list[Trace]:
        """Return ``count`` traces with the same first ``cut`` tokens, whose futures are resampled from the family.

        The sentence that the cut runs through is drawn anew among those that agree with its visible part; if none of
        ``TRIES`` draws does, it stays as it is. All later sentences are new.

        Raises
        ------
        ValueError
            If the cut is outside the trace.
        """
        if not 0 <= cut <= self.trace_length:
            raise ValueError(f"cut={cut} is outside the trace: choose 0 to trace_length={self.trace_length}")
        rng = self._rng(trace_id)
        state = self.family.start(rng, self.split)
        tokens = _Tokens(self.encoder)
        tokens.add(state.header)
        header_length = len(tokens.ids)
        before, state_before = tokens.fork(), state.copy()
        while len(tokens.ids) < cut:
            before, state_before = tokens.fork(), state.copy()
            tokens.add(self.family.sentence(state, rng))
        # Each fork: the sentence under the cut as a reader of the first `cut` tokens may expect it to end.
        begun = len(before.ids) < cut < len(tokens.ids)
        forks = self._agreeing(before, state_before, tokens.ids[:cut], trace_id) if begun else []
        forks = forks or [(tokens, state)]
        return [
            self._continue(
                *self._rng(trace_id, cut, k).pick(forks), self._rng(trace_id, cut, k, "future"), header_length, k
            )
            for k in range(count)
        ]

    def _agreeing(self, before: _Tokens, state: State, seen: list[int], trace_id: int) -> list[tuple[_Tokens, State]]:
        rng = self._rng(trace_id, len(seen), "sentence")
        found = []
        for _ in range(TRIES):
            tokens, after = before.fork(), state.copy()
            tokens.add(self.family.sentence(after, rng))
            if tokens.ids[: len(seen)] == seen:
                found.append((tokens, after))
        return found

    def _continue(self, tokens: _Tokens, state: State, rng: Draw, header_length: int, k: int) -> Trace:
        tokens, state = tokens.fork(), state.copy()
        while len(tokens.ids) < self.trace_length:
            tokens.add(self.family.sentence(state, rng))
        name = f"{self.name}/{self.split}/continuation {k}"
        return tokens.trace(self.trace_length, self._prompt_length(header_length), name)
