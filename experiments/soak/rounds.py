"""Rounds: every phase in turn, again and again, in one process, with a note of what it holds after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.progress import track
from experiments.soak import environments
from experiments.soak.environments import Round
from experiments.soak.held import Change, Measure, measures, read
from experiments.soak.restarts import RESTARTS

Phase = Callable[[Round], int]
"""Does something, drops it, and returns the steps that it made."""

SHARES = {"single": 0.1, "vector": 0.5, "snapshots": 0.1, "heads": 0.1, "rank": 0.1, "rollouts": 0.1}
"""Shares of the steps, by phase; what the other phases do isn't counted."""

PHASES: dict[str, Phase] = {
    name: getattr(environments, name) for name in (*SHARES, "generate", "models", "mistakes")
} | RESTARTS


@dataclass(frozen=True)
class Soaked:
    """What was done and what was held.

    Attributes
    ----------
    phases : list of str
        Names.
    measures : dict of str to Measure
        What was measured.
    steps, seconds : array (rounds, phases)
        What each phase did and took.
    held : array (rounds, phases, measures)
        What the process held after each phase.
    """

    phases: list[str]
    measures: Mapping[str, Measure]
    steps: np.ndarray
    seconds: np.ndarray
    held: np.ndarray

    def change(self, phase: str, measure: str) -> Change:
        """Return how much was held after a phase, early and late."""
        return Change.of(self.held[:, self.phases.index(phase), list(self.measures).index(measure)])

    def grown(self, phase: str) -> list[str]:
        """Return the measures that aren't flat after a phase."""
        return [name for name, of in self.measures.items() if abs(self.change(phase, name).relative) > of.allowed]

    @property
    def leaking(self) -> list[str]:
        """The phases after which something isn't flat."""
        return [phase for phase in self.phases if self.grown(phase)]


def soak(phases: Mapping[str, Phase], *, steps: int, rounds: int, directory: Path, device: str) -> Soaked:
    """Go through the phases again and again.

    Parameters
    ----------
    phases : dict of str to callable
        What to do. Those in :data:`SHARES` share the steps.
    steps, rounds : int
        In all.
    directory : Path
        For files, with a trace store in ``store``.
    device : str
        Where models are.
    """
    measured, shape = measures(device), (rounds, len(phases))
    shares = [SHARES.get(name, 0) for name in phases]
    due = [int(np.ceil(steps / rounds * share / (sum(shares) or 1))) for share in shares]
    # Made before the first round: what is noted must not count as held.
    held = np.zeros((*shape, len(measured)), np.int64)
    soaked = Soaked(list(phases), measured, np.zeros(shape, np.int64), np.zeros(shape), held)
    for number in track(range(rounds), "soak"):
        for column, phase in enumerate(phases.values()):
            began = time.perf_counter()
            soaked.steps[number, column] = phase(Round(number, due[column], directory, device))
            soaked.seconds[number, column] = time.perf_counter() - began
            held[number, column] = read(measured)
    return soaked
