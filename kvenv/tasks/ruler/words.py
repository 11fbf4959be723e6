"""RULER's aggregation tasks: ``scripts/data/synthetic/common_words_extraction.py`` and ``freq_words_extraction.py``."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np

from kvenv.tasks.ruler.recipe import Prompt, Recipe, distinct, letters

KINDS = ("noun", "adjective", "verb")
NUM_COMMON = 10


@cache
def english(*kinds: str) -> tuple[str, ...]:
    """Return the words of kinds (``"noun"``, ``"adjective"``, ``"verb"``) that RULER draws from, each once.

    Raises
    ------
    ValueError
        If the package ``wonderwords``, whose lists they are, is not installed.
    """
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise ValueError(f"RULER's words need {missing_words()}") from error
    return tuple(sorted({word for kind in kinds for word in RandomWord().filter(include_categories=[kind])}))


def missing_words() -> str:
    """Return what :func:`english` lacks; nothing if it works."""
    return "" if find_spec("wonderwords") else "the package wonderwords (pip install 'kvenv[tasks]')"


@dataclass(frozen=True)
class CommonWords(Recipe):
    """The ten words are to be named that a list has more often than others; its size is in different words.

    Attributes
    ----------
    length : int
        Most tokens: short prompts repeat words less often.
    """

    length: int

    max_new_tokens = 120
    least = NUM_COMMON + 1

    INSTRUCTION = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
    ANSWER = " Answer: The top 10 words that appear most often in the list are:"

    @property
    def most(self) -> int:
        return len(english(*KINDS))

    @property
    def missing(self) -> str:
        return missing_words()

    def draw(self, rng: np.random.Generator, number: int, size: int) -> Prompt:
        """Return a prompt with a list of ``size`` different words, behind an example with its answer."""
        short = self.length < 4096
        shown, told = self._list(rng, 20, 3, 1) if short else self._list(rng, 40, 10, 3)
        asked, common = self._list(rng, size, 6, 1) if short else self._list(rng, size, 30, 3)
        example = self.INSTRUCTION + shown + self.QUESTION + self.ANSWER + _numbered(told)
        return Prompt(f"{example}\n{self.INSTRUCTION}{asked}", self.QUESTION, self.ANSWER, tuple(common))

    def _list(self, rng: np.random.Generator, size: int, often: int, seldom: int) -> tuple[str, list[str]]:
        """Return a shuffled list and the words that are in it ``often``."""
        known = english(*KINDS)
        words = [known[i] for i in rng.permutation(len(known))[:size]]
        repeated = words[:NUM_COMMON] * often + words[NUM_COMMON:] * seldom
        rng.shuffle(repeated)
        return _numbered(repeated), words[:NUM_COMMON]


@dataclass(frozen=True)
class FrequentWords(Recipe):
    """The three most frequent coded words are to be named; its size is in words, but for those that round to none.

    Rank ``k`` of ``length // 50`` coded words has its share of a zeta distribution with alpha 2; the first is dots.

    Attributes
    ----------
    length : int
        Most tokens.
    """

    length: int

    max_new_tokens = 50
    least = 74  # from here on the fourth rank surely has more words than the fifth

    CONTEXT = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    QUESTION = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    ANSWER = " Answer: According to the coded text above, the three most frequently appeared words are:"

    def draw(self, rng: np.random.Generator, number: int, size: int) -> Prompt:
        """Return a prompt with about ``size`` coded words."""
        coded = distinct(lambda: letters(rng, string.ascii_lowercase, 6), max(6, self.length // 50))
        coded[0] = "..."
        zeta_of_2 = math.pi**2 / 6
        counts = (size * np.arange(1.0, len(coded) + 1) ** -2 / zeta_of_2).astype(int)
        text = [word for word, count in zip(coded, counts) for _ in range(count)]
        rng.shuffle(text)
        return Prompt(self.CONTEXT + " ".join(text), self.QUESTION, self.ANSWER, tuple(coded[1:4]))


def _numbered(words: list[str]) -> str:
    """Return words as ``1. first 2. second``."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
