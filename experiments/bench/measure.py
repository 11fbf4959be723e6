"""Timing sides alternately, and rows of results."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

Side = Callable[[], object]
Times = dict[str, np.ndarray]

_RELATIONS = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Row:
    """One line of a section's table.

    Attributes
    ----------
    section, case, metric : str
        What was measured.
    value, baseline : float
        Ours, and what it is compared with; baseline is NaN if nothing.
    ratio : float
        value / baseline, of medians.
    spread : float
        Half the interquartile range of the paired ratios.
    unit : str
        Of value and baseline.
    target : str
        What the ratio (the value, if there is no baseline) is to be, e.g. ``"<= 1.15"``; empty if nothing.
    floor : float
        What the machine would allow by bytes and FLOPs, in the same unit; NaN if not computed.
    """

    section: str
    case: str
    metric: str
    value: float
    unit: str
    baseline: float = float("nan")
    ratio: float = float("nan")
    spread: float = float("nan")
    target: str = ""
    floor: float = float("nan")

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if not self.target:
            return None
        relation, bound = self.target.split()
        return bool(_RELATIONS[relation](self.value if np.isnan(self.ratio) else self.ratio, float(bound)))


def alternate(sides: Mapping[str, Side], repeats: int, *, warmup: int = 2, device: str = "cpu") -> Times:
    """Return the seconds (repeats,) of each side, measured in turn so that a busy machine hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + repeats):
        for name, side in sides.items():
            seconds = _timed(side, device)
            if turn >= warmup:
                taken[name].append(seconds)
    return {name: np.array(seconds) for name, seconds in taken.items()}


def compare(
    section: str,
    case: str,
    times: Times,
    ours: str,
    baseline: str,
    *,
    amount: float = 0.0,
    target: str = "",
    floor: float = float("nan"),
) -> Row:
    """Return a row of two sides' times: milliseconds, or, with an amount of tokens, tokens per second.

    Parameters
    ----------
    section, case : str
        What was measured.
    times : dict
        From :func:`alternate`.
    ours, baseline : str
        Names of two sides.
    amount : float
        Tokens of one call; 0 for times.
    target : str
        Of the ratio.
    floor : float
        Least possible seconds of one call.
    """
    one, other = times[ours], times[baseline]
    paired = other / one if amount else one / other
    spread = float(np.subtract(*np.percentile(paired, [75, 25]))) / 2

    def shown(seconds: float) -> float:
        return amount / seconds if amount else 1e3 * seconds

    value, base = shown(float(np.median(one))), shown(float(np.median(other)))
    return Row(
        section, case, f"{ours} / {baseline}", value, "tokens/s" if amount else "ms",
        base, value / base, spread, target, shown(floor),
    )  # fmt: skip


def _timed(side: Side, device: str) -> float:
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronise()
    began = time.perf_counter()
    side()
    synchronise()
    return time.perf_counter() - began
