"""Progress with time left, for everything that takes longer than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

FIRST_SECONDS, PLAIN_SECONDS = 2.0, 10.0
"""When the first plain line is due, and the time between two."""


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items of ``iterable`` and report on stderr how far it is and how long the rest will take.

    On a terminal that is a bar; elsewhere (a log, CI) a plain line after two seconds, then every ten, and no bar.

    Parameters
    ----------
    iterable : iterable
        What to go through.
    description : str
        What is being done, e.g. ``"training"``.
    total : int, optional
        The number of items; ``len(iterable)`` if it has one. Without it no time left is shown.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _track_plainly(iterable, description, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(iterable, total=total, description=description)


def _track_plainly(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    """Yield the items; print ``description: done/total, time left`` after two seconds, then every ten."""
    start = time.monotonic()
    due = start + FIRST_SECONDS
    for done, item in enumerate(iterable):
        now = time.monotonic()
        if now >= due:
            due = now + PLAIN_SECONDS
            of = f"/{total}" if total else ""
            left = f", about {(now - start) / done * (total - done):.0f} s left" if total and done else ""
            print(f"{description}: {done}{of}{left}", file=sys.stderr, flush=True)
        yield item
