"""A program to be compared with whose dependencies clash with ours: in a virtual environment of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, cast

from experiments.venvs import make_venv

KVPRESS = ("kvpress==0.5.5", "transformers<5.3", "gymnasium")
"""What stands beside PyTorch in kvpress's environment; the last is what kvenv needs besides to be imported there."""
ENVIRONMENT = Path("runs/kvpress-venv")
"""Where kvpress is, or is installed."""


class Peer:
    """A script that answers lines of JSON, kept running so that only its answers are timed.

    Parameters
    ----------
    requirements : sequence of str
        What its environment holds, for pip.
    environment : Path
        Where that is, or is made; what it lacks is installed.
    script : Path
        The script.
    arguments : sequence of str
        Its arguments.

    Raises
    ------
    OSError
        If the environment can't be made.
    """

    def __init__(self, requirements: Sequence[str], environment: Path, script: Path, arguments: Sequence[str]) -> None:
        python = make_venv(environment, requirements)
        # Isolated, or the names of our sections would stand for modules of its own.
        self._process = subprocess.Popen(
            [python, "-I", str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **question: object) -> Any:
        """Return the answer to a question.

        Raises
        ------
        OSError
            If the script ended instead.
        """
        questions, answers = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        questions.write(json.dumps(question) + "\n")
        questions.flush()
        answer = answers.readline()
        if not answer:
            raise OSError(f"{' '.join(map(str, cast('list[str]', self._process.args)))} ended without an answer")
        return json.loads(answer)

    def close(self) -> None:
        """End the script."""
        self._process.communicate()


def kvpress(script: Path, arguments: Sequence[str]) -> Peer:
    """Return a script that runs beside kvpress, with this process's version of PyTorch.

    Raises
    ------
    OSError
        If its environment can't be made.
    """
    return Peer((f"torch=={version('torch').split('+')[0]}", *KVPRESS), ENVIRONMENT, script, arguments)
