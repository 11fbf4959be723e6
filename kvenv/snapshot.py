"""What a rollout can be gone on from: counters on the host, and snapshots of everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Counters:
    """What the host knows of each row without asking the device: arrays (N,).

    Attributes
    ----------
    trace, budget, seed, rollout : array of int64
        Trace id, B, and seed and rollout number of the noise.
    anchor, position, last : array of int64
        Positions of the first decision, of the next token to be fed and of the last token, which is only a target.
    steps : array of int64
        Steps taken in this episode.
    finished, truncated : array of bool
        Whether the episode is over, and whether before its trace's end.
    """

    trace: np.ndarray
    budget: np.ndarray
    seed: np.ndarray
    rollout: np.ndarray
    anchor: np.ndarray
    position: np.ndarray
    last: np.ndarray
    steps: np.ndarray
    finished: np.ndarray
    truncated: np.ndarray

    @classmethod
    def blank(cls, rows: int) -> Counters:
        """Return those of rows that no episode has begun in: trace -1, finished."""
        numbers = {x.name: np.full(rows, -1, np.int64) for x in fields(cls)}
        return cls(**numbers | {"finished": np.ones(rows, np.bool_), "truncated": np.zeros(rows, np.bool_)})

    def set(self, rows: np.ndarray, **values: Sequence[int] | int) -> None:
        """Overwrite some rows (indices)."""
        for name, value in values.items():
            getattr(self, name)[rows] = value

    def copy(self) -> Counters:
        """Return a copy that shares nothing."""
        return Counters(**{x.name: getattr(self, x.name).copy() for x in fields(self)})


@dataclass(frozen=True)
class Snapshot:
    """The state of all rows at a decision: goes on in the environment it is from, or one with the same arguments.

    Attributes
    ----------
    arguments : dict
        What defines the dynamics; must be the same where it is restored.
    needs : frozenset of str
        What the cache followed.
    tensors : dict of Tensor
        The cache's state.
    counters : Counters
        The host's state.
    generators : tuple of dict
        State of each row's random generator.
    seeds : tuple of int
        What they were seeded with.
    begun : array of int64
        Episodes begun in each row since.
    """

    arguments: dict[str, object]
    needs: frozenset[str]
    tensors: dict[str, Tensor]
    counters: Counters
    generators: tuple[Mapping[str, Any], ...] = ()
    seeds: tuple[int, ...] = ()
    begun: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
