"""Checkpoints: safetensors + JSON, whole or absent, the newest valid one wins."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from agents.learner import State
from kvenv.files import read_json, sealed, unsealed, write_atomic

KEPT = 2
"""Checkpoints that are kept: a damaged newest one has a predecessor."""

FORMAT = "kvenv-checkpoint-1"
"""What ``state.json`` says it is."""

_TENSORS, _VALUES = "state.safetensors", "state.json"


def save_checkpoint(directory: str | os.PathLike[str], state: State, step: int) -> None:
    """Write a checkpoint and drop those that are older than the kept ones.

    Parameters
    ----------
    directory : path-like
        Holds one directory per checkpoint, named by its step.
    state : State
        What to write.
    step : int
        Updates made; larger is newer.
    """
    target = Path(directory) / f"{step:08d}"
    tensors = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()})
    write_atomic(target / _TENSORS, tensors)
    # Last: a directory without it is not a checkpoint, and its digest says whether both belong together.
    digest = hashlib.sha256(tensors).hexdigest()
    values = sealed({"format": FORMAT, "sha256": digest, "values": state.values})
    write_atomic(target / _VALUES, json.dumps(values))
    kept = checkpoints(directory)[-KEPT:]
    # Those that a killed process left without an end are dropped, too.
    for old in Path(directory).iterdir():
        if old.name.isdigit() and old not in kept:
            shutil.rmtree(old, ignore_errors=True)


def checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """Return the complete checkpoints of a directory, oldest first."""
    return sorted(path.parent for path in Path(directory).glob(f"*/{_VALUES}") if path.parent.name.isdigit())


def load_checkpoint(directory: str | os.PathLike[str]) -> State:
    """Return the newest checkpoint that can be read; a warning names every newer one and what is wrong with it.

    Raises
    ------
    FileNotFoundError
        If there is none at all.
    ValueError
        If there are some, and all are damaged; the message names the newest and what is wrong with it.
    """
    found = checkpoints(directory)
    if not found:
        raise FileNotFoundError(f"{directory} holds no checkpoint")
    problems: list[str] = []
    for path in reversed(found):
        try:
            state = _read(path)
        except (OSError, ValueError, SafetensorError) as error:
            problems.append(f"{path}: {error}")
            continue
        for problem in problems:
            warnings.warn(f"{problem}; going on from {path.name}", stacklevel=2)
        return state
    raise ValueError(f"no checkpoint can be read: {problems[0]}")


def _read(path: Path) -> State:
    """Return the checkpoint in a directory.

    Raises
    ------
    OSError, ValueError, SafetensorError
        If it is damaged or something else.
    """
    description = read_json(path / _VALUES, "a checkpoint")
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{_VALUES} is not a checkpoint of format {FORMAT!r}")
    description = unsealed(description, path / _VALUES)
    tensors = (path / _TENSORS).read_bytes()
    if hashlib.sha256(tensors).hexdigest() != description.get("sha256"):
        raise ValueError(f"{_TENSORS} is damaged or belongs to another checkpoint: its digest differs")
    if not isinstance(description.get("values"), dict):
        raise ValueError(f"{_VALUES} has no object 'values'")
    return State(load(tensors), description["values"])


def module_state(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return copies of a module's tensors by prefixed name."""
    return {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in module.state_dict().items()}


def restore_module(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    """Put back what :func:`module_state` returned.

    Raises
    ------
    ValueError
        If it doesn't fit the module.
    """
    own = {key.removeprefix(f"{prefix}."): x for key, x in tensors.items() if key.startswith(f"{prefix}.")}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"the state's {prefix} doesn't fit this learner's: {error}") from error


def optimizer_state(optimizer: torch.optim.Optimizer, prefix: str = "optimizer") -> dict[str, Tensor]:
    """Return an optimizer's moments and counters as named tensors."""
    entries = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value).clone()
        for index, entry in entries.items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str = "optimizer") -> None:
    """Put back what :func:`optimizer_state` returned; learning rates are the schedule's business."""
    entries: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix + "."):
            index, name = key.removeprefix(prefix + ".").split(".", 1)
            entries.setdefault(int(index), {})[name] = tensor.clone()
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
