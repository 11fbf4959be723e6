"""The command line: every module with a ``main`` is a command, ``kvenv NAME`` or ``python -m experiments.NAME``."""

from __future__ import annotations

import sys

import agents

# Another distribution on the index brings a package `agents` too; every command would fail in some obscure way.
if not getattr(agents, "__kvenv__", False):
    place = getattr(agents, "__file__", None) or next(iter(agents.__path__))
    print(f"kvenv: error: `agents` is not kvenv's but {place}: uninstall or move that package", file=sys.stderr)
    sys.exit(2)
