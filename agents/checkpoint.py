"""Checkpoints: safetensors + JSON, whole or absent, the newest valid one wins."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from agents.learner import State
from kvenv.files import write_atomic

KEPT = 2
"""Checkpoints that are kept: a damaged newest one has a predecessor."""

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
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    write_atomic(target / _TENSORS, save(tensors))
    # Last: a directory without it is not a checkpoint.
    write_atomic(target / _VALUES, json.dumps(state.values))
    for old in checkpoints(directory)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """Return the complete checkpoints of a directory, oldest first."""
    return sorted(path.parent for path in Path(directory).glob(f"*/{_VALUES}") if path.parent.name.isdigit())


def load_checkpoint(directory: str | os.PathLike[str]) -> State:
    """Return the newest checkpoint that can be read.

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
    problems = []
    for path in reversed(found):
        try:
            values = json.loads((path / _VALUES).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("state.json is not a JSON object")
            return State(load((path / _TENSORS).read_bytes()), values)
        except (OSError, ValueError, SafetensorError) as error:
            problems.append(f"{path}: {error}")
    raise ValueError(f"no checkpoint can be read: {problems[0]}")


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
