"""What this process holds at a moment, and whether it holds the same later."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experiments.bench.memory import status

FLAT = 0.02
"""Relative change up to which memory counts as flat."""

FEWEST = 3
"""Samples that a comparison takes: a warm-up, a start and an end."""


@dataclass(frozen=True)
class Measure:
    """One thing that a process can hold too much of.

    Attributes
    ----------
    read : callable
        Says how much there is now.
    allowed : float
        Relative change that is none.
    unit : float
        What it is shown in.
    """

    read: Callable[[], int]
    allowed: float = 0.0
    unit: float = 1.0


def measures(device: str) -> dict[str, Measure]:
    """Return what is measured, by name; on an accelerator also what PyTorch has allocated there."""
    known = {
        "resident MB": Measure(lambda: status("VmRSS"), FLAT, 1e6),
        "blocks k": Measure(sys.getallocatedblocks, FLAT, 1e3),
        "tensors": Measure(_tensors),
        "files": Measure(_open_files),
        "threads": Measure(lambda: len(os.listdir("/proc/self/task"))),
        "children": Measure(_children),
        "maps": Measure(_mapped_files),
    }
    if device.startswith("cuda"):
        known["allocated MB"] = Measure(torch.cuda.memory_allocated, FLAT, 1e6)
    return known


def read(measured: dict[str, Measure]) -> list[int]:
    """Return what is held, after what nobody refers to was collected and free memory given back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
    return [measure.read() for measure in measured.values()]


@dataclass(frozen=True)
class Change:
    """How much of something was held at the start, after warming up, and at the end."""

    first: float
    last: float

    @classmethod
    def of(cls, samples: Sequence[float] | np.ndarray) -> Change:
        """Return the medians of the first and of the last quarter of what follows the first quarter, the warm-up.

        Raises
        ------
        ValueError
            If there are fewer than :data:`FEWEST` samples.
        """
        if len(samples) < FEWEST:
            raise ValueError(f"{len(samples)} samples are too few: warm-up, start and end take {FEWEST}")
        after = samples[max(1, len(samples) // 4) :]
        quarter = max(1, len(after) // 4)
        return cls(float(np.median(after[:quarter])), float(np.median(after[-quarter:])))

    @property
    def relative(self) -> float:
        """Difference over what was held at the start; infinite if that was nothing and there is something now."""
        if self.first == self.last:
            return 0.0
        return (self.last - self.first) / self.first if self.first else float("inf")


def _tensors() -> int:
    """Count tensors; by their types, since asking an object for its class can wake a lazy one."""
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _children() -> int:
    """Count child processes, those included that ended and nobody waited for."""
    return sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children"))


def _mapped_files() -> int:
    """Count mappings of stores and weights, those of deleted files included."""
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(".safetensors")
