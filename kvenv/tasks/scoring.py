"""Scores of generated text, as the benchmarks define them; each is a :data:`kvenv.tasks.Score`."""

from __future__ import annotations


def string_match_all(generated: str, references: tuple[str, ...]) -> float:
    """Return which share of the references is in the text, upper and lower case alike (RULER, all tasks but QA)."""
    text = generated.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def string_match_part(generated: str, references: tuple[str, ...]) -> float:
    """Return 1 if any reference is in the text, upper and lower case alike, else 0 (RULER's QA)."""
    text = generated.lower()
    return float(any(reference.lower() in text for reference in references))
