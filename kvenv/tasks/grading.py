r"""Grades of answers in a ``\boxed{}``: numbers by math-verify, options by their letter."""

from __future__ import annotations

import re
import signal
import threading
from typing import Any

SECONDS = 5  # that math-verify may take over one step; some powers of powers would take forever

# A letter alone, or one that names an option: (C), C) 11, \text{C}. Not the A of "A = benzoquinone".
_OPTION = re.compile(r"[\s({$]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?[\s(]*([A-E])\s*(?:[).:,}$]|$)")
_STATED = re.compile(r"(?i:answer)(?:\s+is)?\s*:?[\s*(]*([A-E])(?!\s*=)\b")


def boxed(text: str) -> str:
    r"""Return what the last closed ``\boxed{}`` that isn't empty holds, or nothing."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                break
        if depth == 0 and text[start:end].strip():
            return text[start:end].strip()
    return ""


def same_number(prediction: str, references: tuple[str, ...]) -> float:
    r"""Return 1 if the last ``\boxed{}`` holds what one of the references says, as math-verify sees it, else 0.

    An answer that was never boxed, as of a text that was cut off, is none.

    Raises
    ------
    ValueError
        If the optional package math-verify is missing.
    """
    answer = boxed(prediction)
    verify = _math_verify().verify
    found = parse(answer) if answer else []
    seconds = _seconds()
    return float(any(verify(parse(reference), found, timeout_seconds=seconds) for reference in references))


def same_letter(prediction: str, references: tuple[str, ...]) -> float:
    r"""Return 1 if the option in the last ``\boxed{}``, or that the answer is said to be, is a reference, else 0."""
    answer = boxed(prediction)
    stated = _STATED.findall(prediction)
    if answer:
        option = _OPTION.match(answer)
        return float(option is not None and option[1] in references)
    return float(bool(stated) and stated[-1] in references)


def parse(answer: str) -> list[Any]:
    """Return what math-verify makes of a bare answer, LaTeX or not; nothing if it makes nothing of it.

    Raises
    ------
    ValueError
        If the optional package math-verify is missing.
    """
    found: list[Any] = _math_verify().parse(rf"\boxed{{{answer}}}", parsing_timeout=_seconds())
    return found


def _seconds() -> int | None:
    # math-verify interrupts itself by an alarm, which only the main thread gets, and Windows doesn't have.
    rings = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    return SECONDS if rings else None


def _math_verify() -> Any:
    """Return the package math-verify."""
    try:
        import math_verify
    except ImportError as error:
        raise ValueError(
            "the numbers of reasoning/aime24 and reasoning/aime25 are graded by the optional package math-verify: "
            "pip install 'kvenv[tasks]'"
        ) from error
    return math_verify
