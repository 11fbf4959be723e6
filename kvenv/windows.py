"""The windows of one forward call: what is the same of them in every layer, computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

DECAY = 0.9
"""Decay per window of the last statistic (ForesightKV's code)."""

SPANS = (8, 16, 32)
"""Newest queries that the statistics ``sum8``, ``sum16``, ``sum32`` are of."""


T = TypeVar("T")


class once(Generic[T]):
    """A property that is computed when first read: ``functools.cached_property``, whose lock can't be compiled."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, owner: object, kind: type) -> T:
        value = self.compute(owner)
        object.__setattr__(owner, self.compute.__name__, value)
        return value


@dataclass(frozen=True)
class Window:
    """Columns of a call that are attended to together, after the eviction before them.

    Attributes
    ----------
    start, stop : int
        Which columns.
    positions : Tensor (N, S) int64
        Absolute positions; anything where padding.
    valid : Tensor (N, S) bool
        Where a token is fed.
    dtype : torch.dtype
        Of attention probabilities, at least float32.
    """

    start: int
    stop: int
    positions: Tensor
    valid: Tensor
    dtype: torch.dtype

    @property
    def next_position(self) -> Tensor:
        """Position (N,) of the first token."""
        return self.positions[:, 0]

    @once
    def active(self) -> Tensor:
        """Rows (N,) bool that any token is fed of."""
        return self.valid.any(dim=1)

    @once
    def held(self) -> Tensor:
        """What slots (N, 1, S) int64 hold that the tokens' pairs are written to: -1 where padding."""
        return torch.where(self.valid, self.positions, -1)[:, None]

    @once
    def reach(self) -> Tensor:
        """Position (N, 1, S, 1) of each query, the last that it sees."""
        return self.positions[:, None, :, None].to(self.dtype)

    @once
    def seen(self) -> Tensor:
        """1 where a query (N, 1, 1, S, 1) exists, 0 where it is padding."""
        return self.valid[:, None, None, :, None].to(self.dtype)

    @once
    def unseen(self) -> Tensor:
        """1 - :attr:`seen`."""
        return 1 - self.seen

    @once
    def present(self) -> Tensor:
        """:attr:`active` as (N, 1, 1, 1) numbers."""
        return self.active[:, None, None, None].to(self.dtype)

    @once
    def spans(self) -> Tensor:
        """Weights (N, 1, 1, 5, S) of the queries in the sums over all, over the newest of :data:`SPANS`, and in the
        newest query alone."""
        age = self.valid.flip(1).cumsum(dim=1).flip(1)
        spans = [self.valid, *(self.valid & (age <= span) for span in SPANS), self.valid & (age == 1)]
        return torch.stack(spans, dim=1)[:, None, None].to(self.dtype)

    @once
    def fading(self) -> Tensor:
        """Factor (N, 1, 1, 2, 1) on the two statistics that go on from window to window."""
        decay = 1 - (1 - DECAY) * self.present
        return torch.stack([torch.ones_like(decay), decay], dim=-2)


def cut(positions: Tensor, valid: Tensor, cuts: Sequence[int], dtype: torch.dtype) -> list[Window]:
    """Return the windows between ``cuts`` of a call's columns (N, S)."""
    return [
        Window(start, stop, positions[:, start:stop], valid[:, start:stop], dtype) for start, stop in pairwise(cuts)
    ]
