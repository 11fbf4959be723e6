"""A learned policy on disk: ``policy.json`` says what it is, ``policy.safetensors`` holds its network's weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safetensors.torch import load, save
from torch import nn

from kvenv.files import write_atomic

DESCRIPTION, WEIGHTS = "policy.json", "policy.safetensors"


class Scoring(Protocol):
    """A policy whose decisions are those of one network."""

    scorer: Any


P = TypeVar("P", bound=Scoring)


def write_policy(directory: str | os.PathLike[str], network: nn.Module, description: dict[str, Any]) -> None:
    """Write a network's weights and what it is; the description last, so that it never lies.

    Parameters
    ----------
    directory : path-like
        Made if missing.
    network : nn.Module
        Its state goes to ``policy.safetensors``.
    description : dict
        JSON-able; ``"type"`` says who can read it (:func:`agents.register_type`).
    """
    target = Path(directory)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomic(target / WEIGHTS, save(tensors))
    write_atomic(target / DESCRIPTION, json.dumps(description, indent=2) + "\n")


def read_policy(
    directory: str | os.PathLike[str], what: str, build: Callable[[dict[str, Any]], P], device: str = "cpu"
) -> P:
    """Return a policy that :func:`write_policy` wrote.

    Parameters
    ----------
    directory : path-like
        Where it is.
    what : str
        What its description should be of, as the error message says it, e.g. ``"a scorer"``.
    build : callable
        Makes the policy from its description; the weights are loaded into its ``scorer``.
    device : str
        Where its network goes.

    Raises
    ------
    ValueError
        If a file is malformed, or the weights don't fit the description.
    FileNotFoundError
        If one is missing.
    """
    source = Path(directory)
    try:
        policy = build(json.loads((source / DESCRIPTION).read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source / DESCRIPTION} is not {what}'s description: {error}") from error
    weights = source / WEIGHTS
    try:
        policy.scorer.load_state_dict(load(weights.read_bytes()))
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors and torch raise their own kinds for what isn't theirs
        raise ValueError(f"{weights} doesn't hold this scorer's weights: {error}") from error
    policy.scorer.to(device).eval()
    return policy
