"""RULER's variable tracking: ``scripts/data/synthetic/variable_tracking.py``."""

from __future__ import annotations

import string
from itertools import pairwise

import numpy as np

from kvenv.tasks.ruler.recipe import NOISE, Prompt, Recipe, distinct, letters

NUM_HOPS = 4
NOISE_OF_EXAMPLE = 10  # what fits into RULER's 500 tokens in steps of five

INSTRUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined "
    "the value {value}, they are: "
)


class VariableTracking(Recipe):
    """All variables of a chain of assignments are to be named; the size is in lines of noise."""

    max_new_tokens = 30
    least = NUM_HOPS + 2

    def draw(self, rng: np.random.Generator, number: int, size: int) -> Prompt:
        """Return a prompt with a chain in ``size`` lines of noise, behind an example with its answer."""
        shown = self._chain(rng, 3, NOISE_OF_EXAMPLE)
        asked = self._chain(rng, 5, size)
        example = f"{shown.context}{shown.question}{shown.answer} {' '.join(shown.references)}"
        return Prompt(f"{example}\n\n\n\n{asked.context}", asked.question, asked.answer, asked.references)

    def _chain(self, rng: np.random.Generator, name_length: int, size: int) -> Prompt:
        """Return a prompt with one chain of variables."""
        names = distinct(lambda: letters(rng, string.ascii_uppercase, name_length), NUM_HOPS + 1)
        value = rng.integers(10000, 99999)
        assignments = [f"VAR {names[0]} = {value}"]
        assignments += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
        pieces = [f"{NOISE}\n"] * size
        places = np.sort(rng.choice(size, len(assignments), replace=False))
        for place, assignment in zip(places[::-1], assignments[::-1]):
            pieces.insert(place, assignment)
        # The last line's end goes to the question, so that what is between the two is encoded in one piece.
        return Prompt(
            INSTRUCTION + " ".join(pieces).removesuffix("\n"),
            "\n" + QUESTION.format(value=value),
            ANSWER.format(count=len(names), value=value),
            tuple(names),
        )
