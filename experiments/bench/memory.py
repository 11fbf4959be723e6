"""Memory that a process holds, and the most that a call takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch


def held(device: str) -> int:
    """Return the bytes that this process holds now: resident on a CPU, allocated on an accelerator.

    Raises
    ------
    OSError
        If the system doesn't tell: it takes Linux.
    """
    return torch.cuda.memory_allocated() if device.startswith("cuda") else status("VmRSS")


def peak(prepare: Callable[..., Callable[[], object]], *arguments: object, device: str) -> int:
    """Return the most bytes that a call holds beyond what was held before it, its result included.

    Parameters
    ----------
    prepare : callable
        Of a module's top level; returns the call. On a CPU it runs in a process of its own, whose high-water mark of
        resident memory nothing else has raised.
    *arguments
        Of ``prepare``; picklable.
    device : str
        Where the call computes.
    """
    if device.startswith("cuda"):
        call = prepare(*arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_resident_peak, prepare, *arguments).result()


def _resident_peak(prepare: Callable[..., Callable[[], object]], *arguments: object) -> int:
    call = prepare(*arguments)
    before = status("VmRSS")
    result = call()
    most = status("VmHWM")
    del result
    return most - before


def status(name: str) -> int:
    """Return a size in bytes of what Linux knows of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return 1024 * int(found[1])
