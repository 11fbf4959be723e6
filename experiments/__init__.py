"""The command line: every module with a ``main`` is a command, ``kvenv NAME`` or ``python -m experiments.NAME``."""

from __future__ import annotations

import os
import sys

import agents

# Loading the bundled LLM takes a moment; its progress bar would only stand between a command's own lines.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# Another distribution on the index brings a package `agents` too; every command would fail in some obscure way.
if not getattr(agents, "__kvenv__", False):
    place = getattr(agents, "__file__", None) or next(iter(agents.__path__))
    print(f"kvenv: error: `agents` is not kvenv's but {place}: uninstall or move that package", file=sys.stderr)
    sys.exit(2)
