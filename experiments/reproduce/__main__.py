"""``python -m experiments.reproduce claims|foresightkv|kvp``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import tyro

from experiments.cli import run
from experiments.reproduce import claims, foresightkv, kvp

PARTS: dict[str, Any] = {"claims": claims, "foresightkv": foresightkv, "kvp": kvp}
"""Modules with ``Args`` and ``reproduce(args, command)``, by what they reproduce."""


def main(argv: Sequence[str] | None = None) -> None:
    """Reproduce what the first argument names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    kinds = {name: part.Args for name, part in PARTS.items()}
    args = tyro.extras.subcommand_cli_from_dict(kinds, args=arguments, prog="kvenv reproduce")
    PARTS[arguments[0]].reproduce(args, " ".join(["python -m experiments.reproduce", *arguments]))


if __name__ == "__main__":
    run(main)
