"""Counter-based noise: the same number wherever, whenever and beside whatever it is drawn."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN_RATIO, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014) on int64 with wrap-around; shifts made logical by a mask."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _wrap(number: int) -> int:
    """Return a Python integer as int64 arithmetic would have wrapped it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def uniform(*counters: Tensor | int) -> Tensor:
    """Return uniform noise in (0, 1), a hash of the counters.

    Parameters
    ----------
    *counters : Tensor int64 or int
        Broadcast against each other, e.g. seed, rollout, layer, head, window, position. At least one tensor.

    Returns
    -------
    Tensor float32
        23 random bits each and half a step, which float32 holds exactly: never 0 or 1.
    """
    device = next(counter.device for counter in counters if isinstance(counter, Tensor))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for counter in counters:
        product = counter * _GOLDEN_RATIO if isinstance(counter, Tensor) else _wrap(counter * _GOLDEN_RATIO)
        state = _mix((state ^ product) + _GOLDEN_RATIO)
    return (((state >> 41) & ((1 << 23) - 1)).to(torch.float32) + 0.5) / (1 << 23)
