"""Traces, sources of traces, and the encoding of words with exact spans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

CACHED = 512  # traces that a source keeps


@dataclass(frozen=True)
class Trace:
    """A token sequence to be decoded.

    Attributes
    ----------
    tokens : numpy.ndarray
        Token ids, shape (T,), int64.
    prompt_length : int
        How many of the first tokens are the prompt; 0 if there is none.
    answers : tuple of (int, int)
        Token spans [start, stop) of the answers, in order.
    name : str
        Where it comes from, e.g. ``"recall/test/17"``.

    Raises
    ------
    ValueError
        If the tokens are no array of token ids, or the prompt or an answer lies outside of them.
    """

    tokens: np.ndarray
    prompt_length: int
    answers: tuple[tuple[int, int], ...]
    name: str

    def __post_init__(self) -> None:
        tokens = self.tokens
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
            raise ValueError(f"trace {self.name!r} must have an array of token ids (T,), T > 0, not {tokens!r}")
        if not 0 <= self.prompt_length <= len(tokens):
            raise ValueError(f"trace {self.name!r} has {len(tokens)} tokens, but a prompt of {self.prompt_length}")
        for start, stop in self.answers:
            if not 0 <= start <= stop <= len(tokens):
                raise ValueError(f"trace {self.name!r} has {len(tokens)} tokens, but an answer from {start} to {stop}")


class TraceSource(ABC):
    """Traces by id. ``size`` is how many there are, None for an endless source (whose ``len`` raises TypeError).

    ``source[trace_id]`` always gives the same trace; the newest ones are kept.
    """

    size: int | None

    def __init__(self, name: str, split: str) -> None:
        self.name = name
        self.split = split
        self._cache: OrderedDict[int, Trace] = OrderedDict()

    @property
    @abstractmethod
    def max_prompt_length(self) -> int:
        """The longest prompt of the split, in tokens."""

    @abstractmethod
    def make(self, trace_id: int) -> Trace:
        """Build a trace; ``source[trace_id]`` is this behind a cache."""

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError(f"traces {self.name!r} are endless and have no length")
        return self.size

    def __getitem__(self, trace_id: int) -> Trace:
        trace_id = int(trace_id)
        if trace_id < 0 or (self.size is not None and trace_id >= self.size):
            known = "0 and more" if self.size is None else f"0 to {self.size - 1}"
            raise IndexError(f"trace {trace_id} of {self.name!r} ({self.split}) does not exist: there are {known}")
        if trace_id in self._cache:
            self._cache.move_to_end(trace_id)
            return self._cache[trace_id]
        trace = self._cache[trace_id] = self.make(trace_id)
        if len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return trace

    def continuations(self, trace_id: int, cut: int, count: int) -> list[Trace]:
        """Return ``count`` traces that share the first ``cut`` tokens of a trace; only families can.

        Raises
        ------
        ValueError
            If this source is not a family.
        """
        raise ValueError(f"traces {self.name!r} cannot be continued in other ways: only the trace families can")


class Encoder:
    """Encodes text word by word, so that the span of every word is exact with any tokenizer.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase or None
        Byte-level tokenizers get a space before every word but the first, as they saw in running text; tokenizers that
        mark word starts themselves get none. ``start`` is the tokenizer's BOS token, if it has one, ``end`` the text of
        its EOS token. Without a tokenizer text is refused with a ValueError.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        marks_words = tokenizer is None or self._encode("the the") == self._encode("the") * 2
        self._space = "" if marks_words else " "
        self._words: dict[str, list[int]] = {}
        self._first: dict[str, list[int]] = {}
        bos = getattr(tokenizer, "bos_token_id", None)
        self.start: list[int] = [] if bos is None else [bos]
        self.end: str = getattr(tokenizer, "eos_token", None) or ""

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise ValueError("traces that are text need a tokenizer, and this model has none: register it with one")
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def word(self, word: str, first: bool = False) -> list[int]:
        """Return the ids of a word; ``first`` says that no text comes before it."""
        table, text = (self._first, word) if first else (self._words, self._space + word)
        if word not in table:
            table[word] = self._encode(text)
        return table[word]

    def part(self, text: str) -> list[int]:
        """Return the ids of a text that follows another one."""
        return self._encode(text) if text else []

    def text(self, text: str) -> list[int]:
        """Return the ids of a text of any kind, BOS first."""
        return self.start + self._encode(text)

    def chat(self, messages: list[dict[str, str]], *, answered: bool) -> str:
        """Return a conversation in the tokenizer's chat template, with the start of an answer if there is none yet.

        Raises
        ------
        ValueError
            If the tokenizer has no chat template.
        """
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise ValueError("messages need a tokenizer with a chat template: give prompt and response instead")
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered)
        return text
