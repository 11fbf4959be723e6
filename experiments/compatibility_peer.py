"""``python -I compatibility_peer.py``: what an installed kvenv does without PyTorch; prints a line of JSON.

Every file must compile without a warning, every module must import or stop at a package that isn't there, and
Gymnasium must know the ids.
"""

from __future__ import annotations

import json
import py_compile
import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from tempfile import TemporaryDirectory

import gymnasium

import kvenv  # noqa: F401  # registers the ids

PACKAGES = ("kvenv", "agents", "experiments")
MISSING = ("torch", "stable_baselines3")
"""What may be missing: PyTorch, and what needs it."""
IDS = ("KVEvict-v0", "KVRank-v0")


def compiled() -> int:
    """Return how many files there are, each of which compiles."""
    files = [file for name in PACKAGES for file in Path(str(import_module(name).__file__)).parent.rglob("*.py")]
    with warnings.catch_warnings(), TemporaryDirectory() as directory:
        warnings.simplefilter("error")
        for file in files:
            py_compile.compile(str(file), cfile=f"{directory}/compiled", doraise=True)
    return len(files)


def imported() -> tuple[int, int]:
    """Return how many modules can be imported, and how many stop at what is missing."""
    names = [module.name for name in PACKAGES for module in walk_packages(import_module(name).__path__, f"{name}.")]
    stopped = 0
    for name in names:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in MISSING:
                raise
            stopped += 1
    return len(names) - stopped, stopped


def main() -> None:
    """Print what was found."""
    specs = [json.loads(gymnasium.spec(name).to_json()) for name in IDS]
    modules, stopped = imported()
    ids = [spec["id"] for spec in specs]
    print(json.dumps({"files": compiled(), "modules": modules, "stopped": stopped, "ids": ids}))


if __name__ == "__main__":
    main()
