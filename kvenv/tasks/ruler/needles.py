"""RULER's needles in a haystack: ``scripts/data/synthetic/niah.py``."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from kvenv.tasks.records import check_fields, read_file
from kvenv.tasks.ruler.recipe import NOISE, Prompt, Recipe, distinct
from kvenv.tasks.ruler.words import english, missing_words

ESSAYS = "PaulGrahamEssays.json"
NEEDLE = "One of the special magic {values} for {key} is: {value}."
DEPTHS = np.round(np.linspace(0, 100, num=40)).astype(int)
"""Where a needle may lie in an essay, in percent of its sentences."""

# With one value to be found, RULER replaces plurals in the template.
ONE = (
    "A special magic {value} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {value} afterwards.\n",
    "\nWhat is the special magic {value} for {query} mentioned in the provided text?",
    " The special magic {value} for {query} mentioned in the provided text is",
)
SEVERAL = (
    "Some special magic {value}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {value}s afterwards.\n",
    "\nWhat are all the special magic {value}s for {query} mentioned in the provided text?",
    " The special magic {value}s for {query} mentioned in the provided text are",
)


class Essays:
    """Paul Graham's essays, which RULER's script downloads.

    Parameters
    ----------
    data : Path or None
        Directory that holds them.
    """

    def __init__(self, data: Path | None) -> None:
        self._path = None if data is None else data / ESSAYS

    @property
    def missing(self) -> str:
        """What there should be and isn't."""
        if self._path is not None and self._path.is_file():
            return ""
        return (
            f"{ESSAYS} in the directory of the data (--task-data); RULER's "
            "scripts/data/synthetic/json/download_paulgraham_essay.py makes that file"
        )

    @cached_property
    def words(self) -> list[str]:
        """All words, in order."""
        if self._path is None:
            raise FileNotFoundError(f"there is no {self.missing}")
        record = read_file(self._path)[0]
        check_fields(record, ("text",), str(self._path))
        return str(record["text"]).split()

    def sentences(self, size: int) -> list[str]:
        """Return the sentences of the first ``size`` words, from the beginning again where the essays end."""
        return re.split(r"(?<=[.!?]) ", " ".join(islice(cycle(self.words), size)))


@dataclass(frozen=True)
class Needles(Recipe):
    """Values of some keys are to be found in a haystack; its size is in lines, or in words of essays.

    Attributes
    ----------
    haystack : str
        ``"noise"``, one sentence again and again, ``"essay"``, or ``"needle"``, other keys with their values.
    key, value : str
        What they are: ``"word"``, ``"number"`` or ``"uuid"``.
    keys, values, queries : int
        How many keys are hidden, how many values has each, how many keys are asked for.
    essays : Essays
        Where essays come from.
    """

    haystack: str
    key: str
    value: str
    keys: int
    values: int
    queries: int
    essays: Essays

    max_new_tokens = 128

    @property
    def missing(self) -> str:
        lacks_words = missing_words() if self.key == "word" else ""
        return lacks_words or (self.essays.missing if self.haystack == "essay" else "")

    def draw(self, rng: np.random.Generator, number: int, size: int) -> Prompt:
        """Return a prompt with needles in a haystack of ``size`` lines or words."""
        others = size if self.haystack == "needle" else 0
        keys = distinct(lambda: self._new(self.key, rng), self.keys + others)
        hidden = {key: [self._new(self.value, rng) for _ in range(self.values)] for key in keys[: self.keys]}
        needles = [self._needle(key, value) for key, values in hidden.items() for value in values]
        rng.shuffle(needles)

        if self.haystack == "essay":
            pieces = self.essays.sentences(size)
            depths = rng.choice(DEPTHS, len(needles), replace=False)
            places = [int(len(pieces) * (depth / 100)) for depth in depths]
        else:
            pieces = [self._needle(key, self._new(self.value, rng)) for key in keys[self.keys :]] or [NOISE] * size
            places = rng.choice(size, len(needles), replace=False).tolist()
        for place, needle in zip(sorted(places, reverse=True), needles):
            pieces.insert(place, needle)

        asked = [keys[i] for i in rng.choice(self.keys, self.queries, replace=False)]
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        before, question, answer = ONE if self.queries * self.values == 1 else SEVERAL
        return Prompt(
            before.format(value=self.value) + (" " if self.haystack == "essay" else "\n").join(pieces),
            question.format(value=self.value, query=query),
            answer.format(value=self.value, query=query),
            tuple(value for key in asked for value in hidden[key]),
        )

    def _needle(self, key: str, value: str) -> str:
        """Return the sentence that tells a value."""
        return NEEDLE.format(values=f"{self.value}s", key=key, value=value)

    def _new(self, kind: str, rng: np.random.Generator) -> str:
        """Return a random word, number of seven digits or UUID."""
        if kind == "word":
            adjectives, nouns = english("adjective"), english("noun")
            return f"{adjectives[rng.integers(len(adjectives))]}-{nouns[rng.integers(len(nouns))]}"
        if kind == "number":
            return str(rng.integers(10**6, 10**7))
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
