"""Where learned policies are: a directory, or a repository of the Hugging Face hub, of which two files are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvenv.files import read_json
from kvenv.registry import HUB_ID

DESCRIPTION, WEIGHTS = "policy.json", "policy.safetensors"


def find(directory_or_id: str, revision: str | None = None) -> Path:
    """Return the directory that a learned policy is in, fetched from the hub if need be.

    Parameters
    ----------
    directory_or_id : str
        A directory, or else a hub id owner/name.
    revision : str, optional
        Commit, tag or branch of a hub id.

    Raises
    ------
    ValueError
        If it is neither, a directory was given a revision, or the hub doesn't give the files.
    FileNotFoundError
        If a directory has no ``policy.json``.
    """
    directory = Path(directory_or_id)
    if os.path.isdir(directory):  # unlike Path's, it takes any name
        if revision is not None:
            raise ValueError(f"revision {revision!r} means nothing for the directory {directory_or_id!r}: leave it out")
        if not (directory / DESCRIPTION).is_file():
            raise FileNotFoundError(f"policy directory {directory_or_id!r} has no {DESCRIPTION}")
        return directory
    if not HUB_ID.fullmatch(directory_or_id):
        raise ValueError(f"{directory_or_id!r} is neither a directory nor a hub id owner/name")
    return _fetch(directory_or_id, revision)


def read_description(directory: Path) -> dict[str, Any]:
    """Return a policy's ``policy.json``, of which only the type is looked at.

    Raises
    ------
    ValueError
        If it isn't one.
    """
    path = directory / DESCRIPTION
    description = read_json(path, "a policy description")
    if not isinstance(description, dict) or not isinstance(description.get("type"), str):
        raise ValueError(f'{path} is not a policy description: a JSON object with a "type"')
    return description


def _fetch(repository: str, revision: str | None) -> Path:
    """Return where the hub's client put a policy's two files."""
    # Imported here: names and directories need not wait for it.
    from huggingface_hub import snapshot_download

    wanted = f"policy {repository!r}" + ("" if revision is None else f", revision {revision!r},")
    try:
        directory = Path(snapshot_download(repository, revision=revision, allow_patterns=[DESCRIPTION, WEIGHTS]))
    except Exception as error:  # its HTTP client raises errors of its own, another one's from version to version
        reason = " ".join(str(error).split())
        raise ValueError(f"{wanted} is no directory here and can't be had from the hub: {reason}") from error
    if missing := [name for name in (DESCRIPTION, WEIGHTS) if not (directory / name).is_file()]:
        raise ValueError(f"{wanted} is on the hub without {' and '.join(missing)}: it is no policy of kvenv")
    return directory
