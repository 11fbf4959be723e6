"""What kvenv claims of its agents, and what the two papers measured beside what we measure."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    import_module("experiments.reproduce.__main__").main(argv)
