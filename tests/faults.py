"""Disks that are full or read-only, and commands whose one line of error is read."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments import cli

NOBODY = 65534


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes, as a full disk does: what fits of a write is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def small_disk(kilobytes: int) -> Iterator[Path]:
    """Make a file system of that size, or skip the test where nobody may."""
    with tempfile.TemporaryDirectory() as made:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", made]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        try:
            yield Path(made)
        finally:
            subprocess.run(["umount", "-l", made], check=True)


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Make a directory read-only and be somebody whom that stops: root is nobody meanwhile."""
    root, mode = not os.geteuid(), directory.stat().st_mode
    directory.chmod(0o555)
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        directory.chmod(mode)


def fails(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """Return the error of a command, which is one line, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line and not re.search(r"\d s left$|^Loading weights", line)]  # but for progress
    assert len(said) == 1, said
    assert said[0].startswith("kvenv: error: ")
    return said[0]
