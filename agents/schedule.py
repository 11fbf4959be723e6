"""What changes over a training: the step size, and the running mean of the weights."""

from __future__ import annotations

import math

import torch
from torch import nn


def warm_cosine(done: int, updates: int, warmup: int, first: float, last: float) -> float:
    """Return the factor on the learning rate of the update after ``done`` others.

    Parameters
    ----------
    done, updates, warmup : int
        Updates made, in all, and of the warm-up.
    first, last : float
        The factor that a linear warm-up begins with, and the one that a cosine falls to.
    """
    if done < warmup:
        return first + (1 - first) * done / warmup
    share = min(1.0, (done - warmup) / max(1, updates - warmup))
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def follow(mean: nn.Module, module: nn.Module, steps: int, decay: float) -> None:
    """Move a running mean of weights towards those of a module that made so many gradient steps.

    Early on the mean forgets faster: the initial weights are no estimate of anything.
    """
    decay = min(decay, steps / (steps + 10))
    for average, weight in zip(mean.parameters(), module.parameters(), strict=True):
        average.lerp_(weight, 1 - decay)
