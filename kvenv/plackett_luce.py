"""Plackett-Luce over the evicted prefix: sample a ranking, score its first picks exactly.

A learned policy's scores are *evict logits*: the higher, the sooner a pair goes. Pick j is drawn from the candidates
that are left with probability softmax(logits); only the picks that are executed (the prefix) have a probability.
Everything is O(C log C) in the C slots: the normaliser of every pick is one entry of a reversed logcumsumexp along the
order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvenv.ranking import eviction_order


def priorities(evict_logits: Tensor, noise: Tensor) -> Tensor:
    """Return keep-priorities whose eviction order is a Plackett-Luce sample (Gumbel top-k, arXiv 1903.06059).

    Parameters
    ----------
    evict_logits : Tensor (..., C)
        Higher goes sooner.
    noise : Tensor (..., C)
        Uniform in (0, 1), :func:`kvenv.noise.uniform`.

    Returns
    -------
    Tensor (..., C)
    """
    return (-noise.log()).log() - evict_logits


def sample(evict_logits: Tensor, positions: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """Return a sampled eviction order (..., C), candidates first.

    Parameters
    ----------
    evict_logits, noise : Tensor (..., C)
        As in :func:`priorities`.
    positions : Tensor (..., C) int64
        Absolute positions, the tie-break.
    mask : Tensor (..., C) bool
        True for candidates.
    """
    return eviction_order(priorities(evict_logits, noise), positions, mask)


def log_prob(evict_logits: Tensor, order: Tensor, mask: Tensor, count: Tensor, at_most: int) -> Tensor:
    """Return the log-probability of each pick given the picks before it.

    Parameters
    ----------
    evict_logits : Tensor (..., C)
        Higher goes sooner; values of non-candidates are ignored.
    order : Tensor (..., C) int64
        Slots, the picks first, then the other candidates in any order, then the rest.
    mask : Tensor (..., C) bool
        True for candidates.
    count : Tensor (...) int64
        Picks that were made.
    at_most : int
        Upper bound of ``count`` known without reading it back: E.

    Returns
    -------
    Tensor (..., E)
        In nats, zero beyond ``count``; their sum is the log-probability of the ordered prefix.
    """
    logits, left = _ordered(evict_logits, order, mask), _left(evict_logits, order, mask)
    return _picks(logits - left, count, at_most)


def kl(
    evict_logits: Tensor, reference_logits: Tensor, order: Tensor, mask: Tensor, count: Tensor, at_most: int
) -> Tensor:
    """Return the exact categorical KL(policy || reference) (..., E) at each pick, given the picks before it.

    ``reference_logits`` (..., C) are those of the reference; the other parameters are those of :func:`log_prob`.
    """
    ratio = torch.where(mask, evict_logits - reference_logits, 0.0).gather(-1, order)
    normalisers = _left(evict_logits, order, mask) - _left(reference_logits, order, mask)
    return _picks(_expectation(ratio, evict_logits, order, mask) - normalisers, count, at_most)


def entropy(evict_logits: Tensor, order: Tensor, mask: Tensor, count: Tensor, at_most: int) -> Tensor:
    """Return the exact entropy (..., E) of each pick given the picks before it, in nats.

    Its sum over the picks is an unbiased estimate of the prefix's entropy if the order was sampled from the policy.
    Parameters are those of :func:`log_prob`.
    """
    left = _left(evict_logits, order, mask)
    logits = torch.where(mask, evict_logits, 0.0).gather(-1, order)
    return _picks(left - _expectation(logits, evict_logits, order, mask), count, at_most)


def _ordered(evict_logits: Tensor, order: Tensor, mask: Tensor) -> Tensor:
    """Return the logits along the order; non-candidates weigh nothing but stay finite, or gradients would be NaN."""
    return torch.where(mask, evict_logits, torch.finfo(evict_logits.dtype).min / 4).gather(-1, order)


def _sum_left(logs: Tensor) -> Tensor:
    """Return the logarithm of the sum over this and all later entries."""
    return logs.flip(-1).logcumsumexp(dim=-1).flip(-1)


def _left(evict_logits: Tensor, order: Tensor, mask: Tensor) -> Tensor:
    """Return the log-normaliser (..., C) of each pick: over the candidates that are left."""
    return _sum_left(_ordered(evict_logits, order, mask))


def _expectation(x: Tensor, evict_logits: Tensor, order: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (..., C) of ordered values ``x`` under the distribution of each pick."""
    # Shifted to be at least 1: logarithms of weights exist, also where all x are 0.
    shift = x.detach().amin(dim=-1, keepdim=True) - 1
    logits = _ordered(evict_logits, order, mask)
    return (_sum_left(logits + (x - shift).log()) - _sum_left(logits)).exp() + shift


def _picks(x: Tensor, count: Tensor, at_most: int) -> Tensor:
    """Return the first E entries, zero beyond the count."""
    made = torch.arange(at_most, device=x.device) < count[..., None]
    return torch.where(made, x[..., :at_most], 0.0)
