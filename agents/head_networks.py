"""Layers of networks that have weights of their own for every (layer, KV head), all of them in one product."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

At = slice | int | tuple[Tensor, Tensor]
"""Whose weights: of all layers, of one layer, or of some heads, given by layers and heads (B,)."""


WIDEST, DEEPEST = 4096, 64
"""Units of a layer, and hidden layers: nobody needs more, and a slip of the keyboard, or a foreign file, would ask for
more than there is memory."""


def check_sizes(**sizes: tuple[int, int]) -> None:
    """Refuse sizes of a network, each with the most that it may be.

    Raises
    ------
    ValueError
        Naming the first that is below 1 or above that.
    """
    for name, (size, most) in sizes.items():
        if not 1 <= size <= most:
            raise ValueError(f"{name} {size} is impossible: it must be from 1 to {most}")


class HeadLinear(nn.Module):
    """A linear layer with weights of its own for every (layer, KV head)."""

    def __init__(self, heads: tuple[int, int], inputs: int, outputs: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*heads, inputs, outputs, generator=generator) * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(*heads, 1, outputs))

    def forward(self, x: Tensor, at: At) -> Tensor:
        """Map (N, L, H, C, inputs), (N, H, C, inputs) of layer ``at``, or (B, C, inputs) of heads."""
        return x @ self.weight[at] + self.bias[at]


class HeadNorm(nn.Module):
    """A layer normalisation with scale and shift of its own for every (layer, KV head)."""

    def __init__(self, heads: tuple[int, int], width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(*heads, 1, width))
        self.shift = nn.Parameter(torch.zeros(*heads, 1, width))

    def forward(self, x: Tensor, at: At) -> Tensor:
        """Normalise the last axis of (N, L, H, C, width), or of what ``at`` says: (N, H, C, width), (B, C, width)."""
        return F.layer_norm(x, x.shape[-1:]) * self.scale[at] + self.shift[at]
