"""What every policy is, and the few operations that several heuristics share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

import agents
from kvenv.state import STATS, LayerState

if TYPE_CHECKING:
    from typing_extensions import Self


class Policy(ABC):
    """Maps one layer's state to keep-priorities.

    Any object with these three members is a policy; the class is there for its name, and to load learned ones. What
    else a policy may have (``encode``, ``check_model``) is in :class:`kvenv.layerwise.Policy`.

    Attributes
    ----------
    name : str
        What tables and files call it.
    needs : frozenset of str
        The optional fields of :class:`kvenv.LayerState` it reads (:data:`kvenv.state.NEEDS`); no other is computed.
    """

    name: str
    needs: frozenset[str] = frozenset()

    @abstractmethod
    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C), higher = keep; those of slots that are no candidates are ignored."""

    @classmethod
    def from_pretrained(
        cls, directory_or_id: str | os.PathLike[str], *, revision: str | None = None, **kwargs: Any
    ) -> Self:
        """Return a learned policy that ``save_pretrained`` or ``push_to_hub`` wrote, as an object of its own class.

        Of a hub repository two files are fetched, ``policy.json`` and ``policy.safetensors``; no code is.

        Parameters
        ----------
        directory_or_id : str or path-like
            A directory, or else a hub id ``owner/name``.
        revision : str, optional
            Commit, tag or branch of a hub id.
        **kwargs
            Passed to what loads its type: ``device``, where its network goes, ``"cpu"`` if not given.

        Raises
        ------
        ValueError
            If it is neither, the hub doesn't give it, a file is malformed, or this is a subclass and the policy isn't
            of it.
        FileNotFoundError
            If the directory lacks a file.
        """
        policy: Any = agents._load(os.fspath(directory_or_id), revision=revision, **kwargs)
        if cls is not Policy and not isinstance(policy, cls):
            raise ValueError(
                f"{directory_or_id} holds a {type(policy).__name__}, no {cls.__name__}: use Policy.from_pretrained"
            )
        return policy


def needed(state: LayerState, field: str) -> Tensor:
    """Return an optional field of the state.

    Raises
    ------
    ValueError
        If it is None: not named in the policy's ``needs``, or unknown for this trace.
    """
    value = getattr(state, field)
    if value is None:
        raise ValueError(
            f"the policy reads state.{field}, which is None: name it in the policy's `needs`"
            " (`future` and `expected_future` exist only where the trace is known)"
        )
    return value


def encoded(policy: Any, state: LayerState) -> Tensor:
    """Return what a policy's ``encode`` says of a state's pairs: what the cache kept of it, or made anew."""
    return policy.encode(state) if state.encoded is None else state.encoded


def precise(x: Tensor) -> Tensor:
    """Return ``x`` in the precision scores are computed in: float64 stays, anything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def statistic(state: LayerState, name: str) -> Tensor:
    """Return an attention statistic (N, H, C), averaged over the group's query heads, 0 in empty slots.

    Parameters
    ----------
    state : LayerState
        With ``stats``.
    name : str
        One of :data:`kvenv.state.STATS`.
    """
    per_head = precise(needed(state, "stats")[..., STATS.index(name)])
    return per_head.mean(2).masked_fill(~state.filled, 0)


def observing(state: LayerState, window: int) -> Tensor:
    """Return (N, H, C) bool: the slots whose tokens are among the last ``window``, or the interval if it is shorter.

    They are the observers of methods with an observation window, which score only what is older.
    """
    return state.positions >= (state.next_position - min(window, state.interval))[:, None, None]


def softmax_over(logits: Tensor, where: Tensor) -> Tensor:
    """Return the softmax over the last axis of the entries ``where`` is True, 0 elsewhere; all-False rows give 0."""
    # The finite floor, unlike -inf, keeps all-False rows free of NaN.
    floored = logits.masked_fill(~where, torch.finfo(logits.dtype).min)
    return floored.softmax(-1).masked_fill(~where, 0)


def pool_neighbours(scores: Tensor, state: LayerState, kernel: int, reduce: str) -> Tensor:
    """Pool scores over each cached token and its cached neighbours in token order.

    Parameters
    ----------
    scores : Tensor (N, H, C)
        Non-negative, 0 in empty slots; beyond the ends of the cache count zeros, as in SnapKV.
    state : LayerState
        Says which token a slot holds.
    kernel : int
        Odd number of tokens pooled.
    reduce : {"mean", "max"}
        How.

    Returns
    -------
    Tensor (N, H, C)
    """
    order = state.positions.argsort(-1)
    pool = F.avg_pool1d if reduce == "mean" else F.max_pool1d
    pooled = pool(scores.gather(-1, order), kernel, stride=1, padding=kernel // 2)
    return torch.empty_like(scores).scatter_(-1, order, pooled)
