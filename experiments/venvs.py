"""Virtual environments beside this one, for what can't share its packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def make_venv(
    directory: Path, requirements: Sequence[str], base: str = sys.executable, system_packages: bool = False
) -> str:
    """Return the Python of a virtual environment, which is made if it isn't there, and lacks nothing afterwards.

    Parameters
    ----------
    directory : Path
        Where it is, or is made.
    requirements : sequence of str
        What it holds, as arguments of ``pip install``.
    base : str
        The Python that makes it.
    system_packages : bool
        Whether it sees the packages of that Python, too.

    Raises
    ------
    OSError
        If it can't be made; pip has said why.
    """
    python, complete, wanted = directory / "bin" / "python", directory / ".complete", "\n".join(requirements)
    if not complete.exists() or complete.read_text(encoding="utf-8") != wanted:
        sees = ["--system-site-packages"] if system_packages else []
        for command in (
            [base, "-m", "venv", *sees, str(directory)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements],
        ):
            if subprocess.run(command, check=False).returncode:
                raise OSError(f"{directory} can't be made: {' '.join(command)} failed")
        complete.write_text(wanted, encoding="utf-8")
    return str(python)
