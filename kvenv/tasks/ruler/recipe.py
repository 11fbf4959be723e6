"""From a recipe, which draws prompts of any size, to questions that fill a length."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvenv.tasks.base import Question, Score, TaskSetting
from kvenv.tasks.prompt import Framer
from kvenv.tasks.scoring import string_match_all

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, in the parts that :meth:`kvenv.tasks.prompt.Framer.frame` takes, and its right answers."""

    context: str
    question: str
    answer: str
    references: tuple[str, ...]


class Recipe(ABC):
    """How the prompts of one task are drawn.

    Attributes
    ----------
    max_new_tokens : int
        Most tokens of an answer (``tokens_to_generate`` of RULER's ``constants.py``).
    score : callable
        What an answer is worth.
    least, most : int
        Sizes between which prompts can be drawn. What a size counts is the recipe's: lines, words, characters.
    """

    max_new_tokens: int
    score: Score = staticmethod(string_match_all)
    least: int = 1

    @property
    def most(self) -> int:
        return sys.maxsize

    @property
    def missing(self) -> str:
        """What the task can't be made without and doesn't have; empty if there is nothing."""
        return ""

    def count(self, asked: int) -> int:
        """Return how many examples there are if so many are asked for."""
        return asked

    @abstractmethod
    def draw(self, rng: np.random.Generator, number: int, size: int) -> Prompt:
        """Return the prompt of example ``number``, as long as ``size`` makes it."""


class Maker:
    """Makes the questions of one task, each as long as the length allows.

    Haystacks of one task have nearly the same number of tokens per unit of size: the size is searched once, by
    bisection for example 0, and an example is tokenized again only if that makes it too long, or shorter than need be.

    Parameters
    ----------
    name : str
        The task's, e.g. ``"ruler/vt"``.
    recipe : Recipe
        What draws its prompts.
    setting : TaskSetting
        Tokenizer, length, split and chat template.
    """

    def __init__(self, name: str, recipe: Recipe, setting: TaskSetting) -> None:
        self._name, self._recipe, self._setting = name, recipe, setting
        self._framer = Framer(setting.tokenizer, setting.chat)

    def __call__(self, number: int) -> Question:
        """Return an example.

        Raises
        ------
        ValueError
            If it doesn't fit into the length however short it is made.
        """
        recipe, (size, rate) = self._recipe, self._usual
        question = self._question(number, size)
        # Coded words, and documents, may take fewer tokens than those of example 0.
        if self._room(question) > 0.03 * self._setting.length and size < recipe.most:
            size = min(recipe.most, size + int(self._room(question) / rate))
            question = self._question(number, size)
        while self._room(question) < 0:
            if size == recipe.least:
                length = self._setting.length
                raise ValueError(
                    f"{question.name} doesn't fit into length={length}: it takes at least "
                    f"{length - self._room(question)} tokens, {recipe.max_new_tokens} of them for the answer"
                )
            # A hundredth at least: a few tokens may not be worth a whole document.
            size = max(recipe.least, size - max(math.ceil(-self._room(question) / rate), size // 100))
            question = self._question(number, size)
        return question

    @cached_property
    def _usual(self) -> tuple[int, float]:
        """The largest size, to one in a hundred, at which example 0 fits, or the least one; tokens per unit of size."""
        least, most = self._recipe.least, self._recipe.most

        def room(size: int) -> int:
            return self._room(self._question(0, size))

        low, high = least, min(most, 2 * least + 1)
        while low < high and room(high) >= 0:
            low, high = high, min(most, 2 * high)
        while high - low > max(1, low // 100):
            middle = (low + high) // 2
            low, high = (middle, high) if room(middle) >= 0 else (low, middle)
        grown = room(least) - room(low)
        return low, grown / (low - least) if grown > 0 else 1.0

    def _question(self, number: int, size: int) -> Question:
        """Return an example of a size; its random numbers depend on task, split and number only."""
        recipe, name = self._recipe, f"{self._name}/{number}"
        rng = np.random.default_rng(list(f"{self._setting.split}/{name}".encode()))
        prompt = recipe.draw(rng, number, size)
        context, question = self._framer.frame(prompt.context, prompt.question, prompt.answer)
        return Question(name, context, question, prompt.references, recipe.max_new_tokens)

    def _room(self, question: Question) -> int:
        """Return how many tokens of the length are left; less than none if it is exceeded."""
        prompt = len(question.context) + len(question.question)
        return self._setting.length - prompt - question.max_new_tokens


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """Return so many different draws."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def letters(rng: np.random.Generator, alphabet: str, count: int) -> str:
    """Return a word of random letters."""
    return "".join(alphabet[i] for i in rng.integers(len(alphabet), size=count))
