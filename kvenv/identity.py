"""Which LLM something was made for: its architecture, as far as cached pairs depend on it, and its weights."""

from __future__ import annotations

import hashlib
import math
import platform
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.rotary import Rotary

SAME_FREQUENCY = 1e-2
"""Relative difference up to which rotary frequencies are the same: what bfloat16 rounds, less than any other base."""

T = TypeVar("T")


def _once_per_model(compute: Callable[[PreTrainedModel], T]) -> Callable[[PreTrainedModel], T]:
    """Remember what a function says of a model for as long as the model lives: kvenv's models are frozen."""
    known: WeakKeyDictionary[PreTrainedModel, T] = WeakKeyDictionary()

    @wraps(compute)
    def remembered(model: PreTrainedModel) -> T:
        if model not in known:
            known[model] = compute(model)
        return known[model]

    return remembered


@_once_per_model
def fingerprint(model: PreTrainedModel) -> str:
    """Return the SHA-256 of a model's weights: names, shapes, dtypes and all bits.

    Of the configuration only the type counts, since versions of transformers add entries of their own; what else of it
    a cache depends on is in :func:`architecture`. It is computed once per model object, half a second per gigabyte.
    """
    return weights_digest(model.named_parameters(), model.config.model_type)


def check_fingerprint(model: PreTrainedModel, expected: str) -> None:
    """Refuse an LLM that isn't the one that another process works with.

    Raises
    ------
    ValueError
        Naming this machine, and both fingerprints.
    """
    if (here := fingerprint(model)) != expected:
        raise ValueError(
            f"the LLM on {platform.node()} has fingerprint {here[:12]}..., the command's {expected[:12]}...: put the "
            "same one on every node"
        )


def weights_digest(tensors: Iterable[tuple[str, Tensor]], kind: str = "") -> str:
    """Return the SHA-256 of named tensors, in the order of their names: names, shapes, dtypes and all bits."""
    digest = hashlib.sha256(kind.encode())
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_shape(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """Return a decoder's layers L, KV heads H, query heads per KV head G and head dimension D."""
    config = model.config.get_text_config()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, kv_heads, heads // kv_heads, head_dim


@dataclass(frozen=True)
class Architecture:
    """What cached pairs depend on besides weights. None is what isn't known.

    Attributes
    ----------
    model_type : str or None
        Transformers' name of the architecture, e.g. ``"qwen3"``.
    layers, kv_heads, groups, head_dim : int or None
        L, H, G (query heads per KV head), D.
    inv_freq : tuple of float, or None
        Angular frequencies of the rotary embedding.
    rotary_scaling : float or None
        Its factor on cosine and sine, see :class:`kvenv.rotary.Rotary`.
    """

    model_type: str | None = None
    layers: int | None = None
    kv_heads: int | None = None
    groups: int | None = None
    head_dim: int | None = None
    inv_freq: tuple[float, ...] | None = None
    rotary_scaling: float | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Architecture:
        """Return what ``dataclasses.asdict`` made.

        Raises
        ------
        KeyError, TypeError, ValueError
            If an entry is missing or of another type.
        """
        sizes = ("layers", "kv_heads", "groups", "head_dim")
        inv_freq = values["inv_freq"]
        return cls(
            model_type=_optional(str, values["model_type"]),
            **{name: _optional(int, values[name]) for name in sizes},
            inv_freq=None if inv_freq is None else tuple(float(frequency) for frequency in inv_freq),
            rotary_scaling=None if values["rotary_scaling"] is None else float(values["rotary_scaling"]),
        )

    def difference(self, other: Architecture) -> str:
        """Return what of that which both know differs, with this one's value and the other's; empty if nothing does."""
        told = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine is not None and theirs is not None and (found := _difference(mine, theirs)):
                told.append(f"{field.name}{found}")
        return "; ".join(told)


@_once_per_model
def architecture(model: PreTrainedModel) -> Architecture:
    """Return a model's architecture.

    Raises
    ------
    ValueError
        If it has no rotary position embedding.
    """
    rotary = Rotary.of(model)
    inv_freq = tuple(rotary.inv_freq.tolist())
    return Architecture(model.config.model_type, *cache_shape(model), inv_freq, rotary.scaling)


names: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""What models were asked for by, see :func:`kvenv.load_model`."""


@dataclass(frozen=True)
class ModelIdentity:
    """Which LLM. None is what isn't known.

    Attributes
    ----------
    name : str or None
        What it was asked for by.
    fingerprint : str or None
        Of its weights, see :func:`fingerprint`.
    architecture : Architecture
        What its cached pairs depend on.
    """

    name: str | None
    fingerprint: str | None
    architecture: Architecture

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelIdentity:
        """Return a model's identity."""
        return cls(names.get(model), fingerprint(model), architecture(model))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ModelIdentity:
        """Return what ``dataclasses.asdict`` made; errors are those of :meth:`Architecture.from_json`."""
        name, digest = (_optional(str, values[known]) for known in ("name", "fingerprint"))
        return cls(name, digest, Architecture.from_json(values["architecture"]))

    def check(self, model: PreTrainedModel, who: str) -> None:
        """Refuse a model of another architecture; warn once of one with other weights.

        Parameters
        ----------
        model : PreTrainedModel
            What ``who`` is to serve.
        who : str
            What was made for the model of this identity.

        Raises
        ------
        ValueError
            With all that differs.
        """
        if difference := self.architecture.difference(architecture(model)):
            raise ValueError(f"{who} was trained for another architecture than this model's: {difference}")
        if self.fingerprint is not None and self.fingerprint != fingerprint(model):
            # Python shows a warning of the same text from the same line once.
            warnings.warn(
                f"{who} was trained for a model with the fingerprint {self.fingerprint[:12]}..., this one has "
                f"{fingerprint(model)[:12]}...: other weights, or another dtype",
                stacklevel=1,
            )


def check_policy(policy: object, model: PreTrainedModel) -> None:
    """Let a policy refuse a model before anything runs, by its method ``check_model(model)`` if it has one.

    Raises
    ------
    ValueError
        The policy's, with its reason.
    """
    check = getattr(policy, "check_model", None)
    if check is not None:
        check(model)


def _optional(kind: type[T], value: Any) -> T | None:
    """Return a JSON value of a type, or None.

    Raises
    ------
    TypeError
        If it is of another type.
    """
    if value is None or isinstance(value, kind):
        return value
    raise TypeError(f"{value!r} must be of type {kind.__name__}, or null")


def _difference(mine: Any, theirs: Any) -> str:
    """Return both values where they differ; of frequencies the first two that do."""
    if isinstance(mine, tuple) and len(mine) == len(theirs):
        pairs = zip(mine, theirs)
        return next((f"[{i}]{found}" for i, pair in enumerate(pairs) if (found := _difference(*pair))), "")
    if isinstance(mine, tuple):
        return f" of {len(mine)} frequencies, not {len(theirs)}"
    same = math.isclose(mine, theirs, rel_tol=SAME_FREQUENCY) if isinstance(mine, float) else mine == theirs
    return "" if same else f" {mine}, not {theirs}"
