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

    def check(self, rows: int) -> None:
        """Refuse what isn't an array of a number, or flag, of each row.

        Raises
        ------
        ValueError
            Naming the first that isn't.
        """
        for name, like in vars(Counters.blank(rows)).items():
            _check_like(f"counters.{name}", getattr(self, name), like)

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

    What the tensors and counters hold is checked as far as nothing breaks; who changes it gets another state.
    """

    arguments: dict[str, object]
    needs: frozenset[str]
    tensors: dict[str, Tensor]
    counters: Counters
    generators: tuple[Mapping[str, Any], ...] = ()
    seeds: tuple[int, ...] = ()
    begun: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def check_arguments(self, own: Mapping[str, object]) -> None:
        """Refuse a snapshot that was taken with other arguments.

        Raises
        ------
        ValueError
            Naming the first that differs.
        """
        arguments = self.arguments if isinstance(self.arguments, Mapping) else {}
        for name, mine in own.items():
            if (theirs := arguments.get(name)) != mine:
                raise ValueError(f"the snapshot was taken with {name}={theirs!r}, this environment has {mine!r}")

    def check_tensors(self, own: Mapping[str, Tensor]) -> None:
        """Refuse tensors of other shapes or types than an environment's own.

        Raises
        ------
        ValueError
            Naming the first.
        """
        tensors = self.tensors if isinstance(self.tensors, Mapping) else {}
        for name, tensor in own.items():
            _check_like(name, tensors.get(name), tensor)

    def check_randomness(self, generators: Sequence[np.random.Generator]) -> None:
        """Refuse states that random generators can't have, and seeds and counts that aren't one per row.

        Raises
        ------
        ValueError
            Naming what isn't right.
        """
        rows = len(generators)
        if not isinstance(self.generators, tuple) or len(self.generators) != rows:
            raise ValueError(f"the snapshot's generators must be {rows} states, not {self.generators!r}")
        for generator, state in zip(generators, self.generators, strict=True):
            try:
                type(generator.bit_generator)().state = state
            except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
                raise ValueError(f"the snapshot has no state of a generator, but {state!r}") from error
        if not isinstance(self.seeds, tuple) or [type(seed) for seed in self.seeds] != [int] * rows:
            raise ValueError(f"the snapshot's seeds must be {rows} integers, not {self.seeds!r}")
        _check_like("begun", self.begun, np.zeros(rows, np.int64))


def _check_like(name: str, theirs: object, own: np.ndarray | Tensor) -> None:
    """Refuse what has another type or shape than an environment's own."""
    if not isinstance(theirs, type(own)) or theirs.dtype != own.dtype or theirs.shape != own.shape:
        shape, dtype = getattr(theirs, "shape", None), getattr(theirs, "dtype", type(theirs).__name__)
        raise ValueError(
            f"the snapshot's {name} has shape {shape and tuple(shape)} and type {dtype}, this environment's "
            f"{tuple(own.shape)} and {own.dtype}"
        )
