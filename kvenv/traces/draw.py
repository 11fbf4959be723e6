"""Seeded draws that give the same numbers in every process and Python version."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw(random.Random):
    """A random stream named by what it is for.

    Only ``random()`` is used: its sequence is the one that Python promises to keep between versions.

    Parameters
    ----------
    *key : object
        What the stream is for, e.g. ``("recall", "test", 17)``; equal keys give equal streams.
    """

    def __init__(self, *key: object) -> None:
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        super().__init__(int.from_bytes(digest, "big"))

    def __new__(cls, *key: object) -> Draw:
        return super().__new__(cls)

    def pick(self, options: Sequence[T]) -> T:
        """Return one of ``options``, each equally likely."""
        return options[int(self.random() * len(options))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """Return ``count`` different ``options`` in random order."""
        left = list(options)
        return [left.pop(int(self.random() * len(left))) for _ in range(count)]
