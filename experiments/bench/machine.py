"""What the machine can do at most: measured copy bandwidth and matrix rate, and which machine it is."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from experiments.bench.measure import alternate

PACKAGES = ("torch", "transformers", "gymnasium", "numpy", "stable-baselines3")


@dataclass(frozen=True)
class Machine:
    """Measured limits.

    Attributes
    ----------
    bytes_per_second : float
        Read and written by copying a tensor that no cache holds.
    flops : float
        Multiplications and additions per second of a large matrix product.
    """

    bytes_per_second: float
    flops: float

    def floor(self, bytes_moved: float, flops: float) -> float:
        """Return the least seconds: what takes longer, moving the bytes or the arithmetic."""
        return max(bytes_moved / self.bytes_per_second, flops / self.flops)


def measure(device: str, dtype: torch.dtype = torch.float32) -> Machine:
    """Measure the machine's limits."""
    big = device.startswith("cuda")
    source = torch.zeros((1 << 28) if big else (1 << 26), dtype=torch.float32, device=device)
    target, size = torch.empty_like(source), 8192 if big else 1536
    matrix = torch.randn(size, size, device=device).to(dtype)
    times = alternate(
        {"copy": lambda: target.copy_(source), "product": lambda: matrix @ matrix}, 9, warmup=3, device=device
    )
    copied, multiplied = (float(np.min(times[name])) for name in ("copy", "product"))
    return Machine(2 * source.nbytes / copied, 2 * size**3 / multiplied)


def facts(device: str) -> dict[str, str | int]:
    """Return what a reader must know of machine and versions."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    versions = {package: version(package) for package in PACKAGES}
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        **versions,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
