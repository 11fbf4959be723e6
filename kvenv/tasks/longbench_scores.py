"""LongBench's scores of a generated text against one reference (THUDM/LongBench on GitHub, metrics.py and eval.py)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from kvenv.tasks.base import Score

Metric = Callable[[str, str], float]
"""From a generated text and one reference to a score between 0 and 1."""


def best(metric: Metric, *, first_line: bool = False) -> Score:
    """Return the score that is the best over the references.

    Parameters
    ----------
    metric : callable
        Scores the text against one of them.
    first_line : bool
        Whether only the text's first line counts, empty ones left out.
    """

    def score(text: str, references: tuple[str, ...]) -> float:
        if first_line:
            text = text.lstrip("\n").split("\n")[0]
        return max((metric(text, reference) for reference in references), default=0.0)

    return score


def f1(text: str, reference: str) -> float:
    """Return the F1 of the words in common, without case, punctuation and articles (SQuAD's normalisation)."""
    words, right = _words(text), _words(reference)
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right)) if common else 0.0


def _words(text: str) -> list[str]:
    """Return the words of a text that count."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def rouge_l(text: str, reference: str) -> float:
    """Return ROUGE-L's F of package ``rouge``, which splits sentences at full stops and counts distinct words.

    Raises
    ------
    ValueError
        If the package is missing.
    """
    rouge = load_rouge()
    try:
        return float(rouge.get_scores(text, reference)[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):  # no word at all, or a thousand without a full stop: 0 in LongBench as well
        return 0.0


@cache
def load_rouge() -> Any:
    """Return the scorer of the optional package ``rouge``.

    Raises
    ------
    ValueError
        If the package is missing.
    """
    try:
        from rouge import Rouge
    except ImportError as error:
        raise ValueError("ROUGE-L needs the optional package rouge (pip install 'kvenv[tasks]')") from error
    return Rouge(metrics=["rouge-l"])


def classification(text: str, reference: str, classes: Sequence[str]) -> float:
    """Return one over the number of classes that the text names, or 0 if the right one isn't among them.

    A class whose name is part of the right one's doesn't count.
    """
    named = [name for name in classes if name in text]
    for name in named:
        if name in reference and name != reference:
            named.remove(name)  # while going through them, as published: the one that follows is passed over
    return 1 / len(named) if reference in named else 0.0


def count(text: str, reference: str) -> float:
    """Return the share of the text's numbers that are the right one."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(text: str, reference: str) -> float:
    """Return the share of the text's numbers that are the right paragraph's.

    Raises
    ------
    ValueError
        If the reference names no paragraph.
    """
    paragraph = re.search(r"Paragraph (\d+)", reference)
    if paragraph is None:
        raise ValueError(f"reference {reference!r} names no paragraph: one such as 'Paragraph 7' was expected")
    return count(text, paragraph[1])


def code_similarity(text: str, reference: str) -> float:
    """Return the similarity of the reference and the text's first line without a comment or a code fence.

    LongBench's ``fuzz.ratio`` of package ``fuzzywuzzy`` is :class:`difflib.SequenceMatcher`'s ratio in whole percent,
    unless python-Levenshtein is installed too, which LongBench doesn't ask for.
    """
    lines = text.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, code, reference).ratio()) / 100
