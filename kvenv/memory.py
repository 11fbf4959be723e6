"""Out of memory: an error that says what was too much and what to lower; an evaluation goes on with half of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

P = TypeVar("P")
R = TypeVar("R")

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What PyTorch's allocators and libraries say where there is no more, each in a RuntimeError of its own."""

LOWER = (
    "take fewer at once (--at-once, --num-traces or --num-envs of a training, --batch-size elsewhere, num_envs of an "
    "environment) or shorter traces"
)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


@contextmanager
def side_by_side(rows: int, tokens: int, what: str = "traces") -> Iterator[None]:
    """Let a run of so many rows of so many tokens end in an error that says so where memory runs out.

    Raises
    ------
    MemoryError
        Naming rows, tokens and what to lower.
    """
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        amount = f"{rows} {what} of {tokens} tokens side by side"
        raise MemoryError(f"{amount} exceed the memory: {LOWER} ({reason})") from error


def in_halves(parts: list[P], run: Callable[[P], Iterable[R]], halve: Callable[[P], list[P]]) -> list[R]:
    """Run the parts of a batch one after the other; one that exceeds the memory is replaced by its halves.

    Parameters
    ----------
    parts : list
        Of the batch; it is changed in place.
    run : callable
        Returns the results of a part, in order.
    halve : callable
        Returns two parts, or one that can't be halved.

    Returns
    -------
    list
        All results in order.

    Raises
    ------
    MemoryError
        If a part that can't be halved exceeds the memory.
    """
    results: list[R] = []
    done = 0
    while done < len(parts):
        try:
            results += list(run(parts[done]))
            done += 1
            continue
        except MemoryError as error:
            halves = halve(parts[done])
            if len(halves) < 2:
                raise
            reason = str(error)
        # Not within the except clause: what its traceback holds is to be freed before the halves run.
        parts[done : done + 1] = halves
        warnings.warn(f"{reason}; going on with half as many", stacklevel=2)
    return results
