"""Whether a process that goes on for long holds no more at the end than at the start."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    import_module("experiments.soak.__main__").main(argv)
