"""How fast kvenv is on this machine, each part beside what it is to be compared with, measured in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

SECTIONS = ("step", "scale", "rollout", "golden", "ranking", "generate", "train", "scaleout", "profile", "gpu")
GPU_ONLY = ("gpu",)
"""Those that are measured on a GPU alone."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    import_module("experiments.bench.__main__").main(argv)
