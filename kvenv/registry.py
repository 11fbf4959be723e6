"""Named things users can add: models, trace sources, rewards and feature sets. A name lasts as long as the process."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any, Generic, TypeVar

T = TypeVar("T")

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""What a name on the Hugging Face hub looks like: owner/name."""


class Registry(Generic[T]):
    """A name -> value table whose errors say what would have been right.

    Parameters
    ----------
    kind : str
        What the table holds, in the singular, as error messages name it.
    reserved : collection of str
        Names that mean something already and can't be registered.
    """

    def __init__(self, kind: str, reserved: Collection[str] = ()) -> None:
        self.kind, self.reserved = kind, reserved
        self._values: dict[str, T] = {}

    def register(self, name: str, value: T) -> None:
        """Add ``value`` under ``name``.

        Raises
        ------
        ValueError
            If the name is empty, taken or reserved.
        """
        if not name:
            raise ValueError(f"{self.kind} name is empty: give it a name")
        if name in self._values or name in self.reserved:
            raise ValueError(f"{self.kind} {name!r} is already registered: choose another name")
        self._values[name] = value

    def get(self, name: str) -> T:
        """Return the value registered under ``name``.

        Raises
        ------
        ValueError
            If there is none; the message lists the known names.
        """
        if name not in self:
            raise ValueError(f"unknown {self.kind} {name!r}: known are {', '.join(self.names())}")
        return self._values[name]

    def names(self) -> list[str]:
        """Return the registered names in the order of registration."""
        return list(self._values)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._values


MODELS: Registry[tuple[Any, Any]] = Registry("model", reserved=("tiny",))
TRACES: Registry[Callable[..., Any]] = Registry("traces")
REWARDS: Registry[Callable[..., Any]] = Registry("reward")
FEATURES: Registry[tuple[Callable[..., Any], Any, frozenset[str], Any]] = Registry("features")


def register_model(name: str, model: Any, tokenizer: Any = None) -> None:
    """Make a loaded Hugging Face model usable as ``model=name``.

    Parameters
    ----------
    name : str
        The name environments, rollouts and commands will know it by.
    model : transformers.PreTrainedModel
        A decoder-only model; it is switched to kvenv's attention when first used.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Needed for traces that are text.

    Raises
    ------
    ValueError
        If the name is taken.
    """
    MODELS.register(name, (model, tokenizer))


def register_traces(name: str, fn: Callable[..., Any]) -> None:
    """Make ``fn(trace_id, split=..., trace_length=..., tokenizer=...) -> kvenv.Trace`` usable as ``traces=name``.

    Raises
    ------
    ValueError
        If the name is taken.
    """
    TRACES.register(name, fn)


def register_reward(name: str, fn: Callable[..., Any]) -> None:
    """Make ``fn(kvenv.rewards.WindowLosses) -> tensor (N,)`` usable as ``reward=name``.

    Raises
    ------
    ValueError
        If the name is taken.
    """
    import_module("kvenv.rewards")  # the built-in names come first: who takes one learns it here
    REWARDS.register(name, fn)


def register_features(
    name: str, fn: Callable[..., Any], size: Any, needs: frozenset[str] = frozenset(), split: Any = None
) -> None:
    """Make ``fn(kvenv.LayerState) -> tensor (N, H, C, F)`` usable as ``features=name``.

    Parameters
    ----------
    name : str
        The name of the feature set.
    fn : callable
        Maps a layer's state to features of every slot; instead of one tensor it may return several that are put side by
        side, which saves copies.
    size : int or callable
        F, or a function of the model's ``(head_dim, queries_per_kv_head)`` that returns it.
    needs : frozenset of str
        What ``fn`` reads of the optional fields of :class:`kvenv.LayerState`, of :data:`kvenv.features.OBSERVABLE`.
    split : kvenv.features.Split, optional
        The same features in two parts: what a pair says once and for all makes learned policies' rollouts faster.

    Raises
    ------
    ValueError
        If the name is taken.
    """
    import_module("kvenv.features")  # as for rewards
    FEATURES.register(name, (fn, size, needs, split))
