"""From priorities to an eviction order and back: only the order among candidates counts."""

from __future__ import annotations

import torch
from torch import Tensor

LAST = torch.iinfo(torch.int64).max
"""Sorts behind every candidate."""


def eviction_order(priorities: Tensor, positions: Tensor, mask: Tensor, first: int | None = None) -> Tensor:
    """Return the slots in the order in which they would be evicted.

    Candidates come first, lowest priority first, ties older first; the other slots follow in no useful order.

    Parameters
    ----------
    priorities : Tensor (..., C)
        Higher means keep; values of non-candidates are ignored.
    positions : Tensor (..., C) int64
        Absolute positions, the tie-break.
    mask : Tensor (..., C) bool
        True for candidates.
    first : int, optional
        How many are asked for; all if not given.

    Returns
    -------
    Tensor (..., first or C) int64
        Slot indices.
    """
    if priorities.dtype == torch.float64:  # leaves no room for the position in one number
        by_age = torch.where(mask, positions, LAST).argsort(dim=-1, stable=True)
        # A candidate's +inf must still go before the others: those are last by age and the sort is stable.
        ranked = torch.where(mask, priorities, torch.inf).gather(-1, by_age).argsort(dim=-1, stable=True)
        return by_age.gather(-1, ranked)[..., :first]
    keys = torch.where(mask, (_ascending(priorities.float()) << 32) + positions, LAST)
    return keys.argsort(dim=-1) if first is None else keys.topk(first, largest=False).indices


def _ascending(x: Tensor) -> Tensor:
    """Return int64 in the order of float32, 0.0 and -0.0 alike: the bits, those of negative numbers turned round."""
    bits = (x + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & torch.iinfo(torch.int32).max)).long()


def action_from_order(order: Tensor, mask: Tensor) -> Tensor:
    """Return the action in the Box that says ``order``: the j-th slot to be evicted gets -1 + 2j/(C-1).

    Non-candidates get 1. Ranks survive clipping to the Box and give the order back exactly, raw scores would not.

    Parameters
    ----------
    order : Tensor (..., C) int64
        Slots in eviction order, candidates first.
    mask : Tensor (..., C) bool
        True for candidates.

    Returns
    -------
    Tensor (..., C) float32
    """
    slots = order.shape[-1]
    ranks = torch.linspace(-1.0, 1.0, slots, device=order.device).expand(order.shape)
    action = torch.empty(order.shape, device=order.device).scatter_(-1, order, ranks)
    return torch.where(mask, action, 1.0)


def order_from_action(action: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Return the eviction order that the environment reads from an action: the inverse of :func:`action_from_order`.

    Parameters
    ----------
    action : Tensor (..., C)
        A keep-priority per slot.
    positions : Tensor (..., C) int64
        Absolute positions from the observation.
    mask : Tensor (..., C)
        The observation's mask; nonzero for candidates.

    Returns
    -------
    Tensor (..., C) int64
        Slot indices; only the first ``mask.sum(-1)`` are candidates.
    """
    return eviction_order(action, positions, mask.bool())


def evict(positions: Tensor, order: Tensor, count: Tensor, at_most: int) -> Tensor:
    """Empty the first ``count`` slots of an eviction order, in place.

    Parameters
    ----------
    positions : Tensor (..., N, H, C) int64
        Set to -1 where evicted.
    order : Tensor (..., N, H, C) int64
        From :func:`eviction_order`.
    count : Tensor, broadcastable to (..., N, H)
        Pairs to evict.
    at_most : int
        Upper bound of ``count`` known without reading it back: E.

    Returns
    -------
    Tensor (..., N, H, E) int64
        Evicted positions in order of eviction, -1 beyond ``count``.
    """
    slots = order[..., :at_most]
    held = positions.gather(-1, slots)
    drop = torch.arange(at_most, device=positions.device) < count[..., None]
    positions.scatter_(-1, slots, torch.where(drop, -1, held))
    return torch.where(drop, held, -1)
