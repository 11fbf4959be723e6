"""Policies and learners: what decides which cached pairs go.

``agents.make("h2o")`` returns a built-in policy, ``agents.make("grpo-tiny")`` one that was trained for the bundled LLM,
``agents.make("runs/mine")`` a saved one, ``agents.make("owner/name")`` one from the Hugging Face hub, and after
``agents.register("mine", factory)`` ``"mine"`` works wherever names work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents import hub
from kvenv.registry import HUB_ID, Registry

if TYPE_CHECKING:
    from agents.base import Policy
    from agents.sb3_env import make_sb3_env
    from agents.sb3_policy import KVRankingPolicy

__all__ = ["TRAINED", "KVRankingPolicy", "Policy", "make", "make_sb3_env", "names", "register", "register_type"]

__kvenv__ = True
"""Tells this package from a foreign one of the same name."""

_POLICIES: Registry[Callable[..., Policy]] = Registry("policy", reserved=("full",))  # no eviction, in evaluation
_TYPES: Registry[Callable[..., Policy]] = Registry("policy type")

TRAINED = ("imitation-tiny", "kvp-tiny", "grpo-tiny", "ppo-tiny")
"""Policies trained for the bundled LLM, package data made by ``kvenv reproduce claims --ship``."""

# Public name -> the module that defines it, imported on first use: PyTorch and Stable-Baselines3 are heavy.
_HEAVY = {"KVRankingPolicy": "agents.sb3_policy", "Policy": "agents.base", "make_sb3_env": "agents.sb3_env"}


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HEAVY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HEAVY})


def register(name: str, factory: Callable[..., Policy]) -> None:
    """Make ``factory(**kwargs) -> policy`` usable as policy ``name``.

    Raises
    ------
    ValueError
        If the name is taken.
    """
    _POLICIES.register(name, factory)


def register_type(name: str, load: Callable[..., Policy]) -> None:
    """Make directories whose ``policy.json`` has ``"type": name`` loadable by ``load(directory, **kwargs) -> policy``.

    Raises
    ------
    ValueError
        If the name is taken.
    """
    _TYPES.register(name, load)


def names(trained: bool = True) -> list[str]:
    """Return the names :func:`make` knows, built-in ones first.

    Parameters
    ----------
    trained : bool
        Whether :data:`TRAINED` are among them, which fit the bundled LLM only.
    """
    return [name for name in _POLICIES.names() if trained or name not in TRAINED]


def make(name_or_directory: str | os.PathLike[str], **kwargs: Any) -> Policy:
    """Return a policy.

    Parameters
    ----------
    name_or_directory : str or path-like
        A registered name, a directory that a learned policy was saved to, or a hub id ``owner/name``. What comes first
        in this list wins; ``./name`` is the directory.
    **kwargs
        Passed to the policy's factory, or to :meth:`agents.Policy.from_pretrained`: ``device``, ``revision``.

    Raises
    ------
    ValueError
        If it is none of these, the hub doesn't give it, or its ``policy.json`` is malformed or of an unknown type.
    FileNotFoundError
        If the directory has no ``policy.json``.
    """
    name = os.fspath(name_or_directory)
    if name in _POLICIES:
        return _POLICIES.get(name)(**kwargs)
    if not os.path.isdir(name) and not HUB_ID.fullmatch(name):
        known = ", ".join(names())
        raise ValueError(f"unknown policy {name!r}: known are {known}, or a directory with a policy.json, or a hub id")
    return _load(name, **kwargs)


def _load(directory_or_id: str, *, revision: str | None = None, **kwargs: Any) -> Policy:
    """Return a learned policy by the loader of its type."""
    directory = hub.find(directory_or_id, revision)
    kind = hub.read_description(directory)["type"]
    try:
        read = _TYPES.get(kind)
    except ValueError as error:
        raise ValueError(f"{directory / hub.DESCRIPTION}: {error}") from error
    return read(directory, **kwargs)


def _lazy(module: str, attribute: str) -> Callable[..., Any]:
    """Return ``module.attribute`` as a callable that imports it when first called."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return attrgetter(attribute)(import_module(module))(*args, **kwargs)

    return build


def _trained(name: str) -> Callable[..., Policy]:
    """Return a factory of a policy that comes with the package."""

    def build(**kwargs: Any) -> Policy:
        return make(Path(__file__).parent / "trained" / name, **kwargs)

    return build


register("random", _lazy("agents.random_eviction", "Random"))
register("random-prompt", _lazy("agents.random_eviction", "RandomPrompt"))
register("streaming", _lazy("agents.streaming", "StreamingLLM"))
register("h2o", _lazy("agents.h2o", "H2O"))
register("snapkv", _lazy("agents.snapkv", "SnapKV"))
register("tova", _lazy("agents.tova", "TOVA"))
register("knorm", _lazy("agents.knorm", "KNorm"))
register("keydiff", _lazy("agents.keydiff", "KeyDiff"))
register("lagkv", _lazy("agents.lagkv", "LagKV"))
register("r-kv", _lazy("agents.rkv", "RKV"))
register("expected-attention", _lazy("agents.expected_attention", "ExpectedAttention"))
register("vase", _lazy("agents.vase", "VaSE"))
register("golden", _lazy("agents.golden", "Golden"))
register("golden-expected", _lazy("agents.golden", "GoldenExpected"))
for _name in TRAINED:
    register(_name, _trained(_name))
register_type("scorer", _lazy("agents.scorer", "ScorerPolicy.read"))
register_type("kvp", _lazy("agents.kvp_scorer", "KVPPolicy.read"))
