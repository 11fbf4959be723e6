"""What is remembered of queries and their attention: ForesightKV's eight statistics, and query moments."""

from __future__ import annotations

import torch
from torch import Tensor

from kvenv.rotary import Rotary
from kvenv.state import STATS
from kvenv.windows import Window

_LARGEST, _SMALLEST = STATS.index("max"), STATS.index("min")
_SUMS = slice(STATS.index("sum"), STATS.index("sum32") + 1)
_HISTORY = slice(STATS.index("cumulative"), STATS.index("decayed") + 1)


class WindowStatistics:
    """Attention statistics of every slot, per query head, kept in place.

    Attributes
    ----------
    values : Tensor (L, N, H, G, 8, C)
        In the order of :data:`kvenv.state.STATS`; a statistic's numbers lie side by side.
    last : Tensor (L, N, H, G, C)
        Attention probabilities of the newest query.
    """

    def __init__(self, shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype, device: torch.device) -> None:
        layers, rows, heads, slots = shape
        self.values = torch.zeros(layers, rows, heads, groups, len(STATS), slots, dtype=dtype, device=device)
        self.last = torch.zeros(layers, rows, heads, groups, slots, dtype=dtype, device=device)

    def of(self, layer: int) -> Tensor:
        """Return a layer's statistics as policies see them: (N, H, G, C, 8)."""
        return self.values[layer].transpose(-1, -2)

    def forget(self, layer: int, slots: Tensor) -> None:
        """Clear the history of slots (N, H, S) that new pairs just took."""
        history = self.values[layer, ..., _HISTORY, :]
        history.scatter_(-1, slots[:, :, None, None].expand(*history.shape[:-1], -1), 0.0)

    def add(self, layer: int, probabilities: Tensor, window: Window) -> None:
        """Take in the attention (N, H, G, S, C) of a window's queries over the slots."""
        # Factors instead of masks, which a CPU takes three times as long for; padding counts as 0 for max, 1 for min.
        largest = (probabilities * window.seen).amax(dim=3)
        smallest = (probabilities + window.unseen).amin(dim=3)
        self.add_reduced(layer, window.spans @ probabilities, largest, smallest, window)

    def add_reduced(self, layer: int, sums: Tensor, largest: Tensor, smallest: Tensor, window: Window) -> None:
        """Take in attention that is reduced over a window's queries already.

        Parameters
        ----------
        layer : int
            Index of the layer.
        sums : Tensor (N, H, G, 5, C)
            Its sums by :attr:`kvenv.windows.Window.spans`.
        largest, smallest : Tensor (N, H, G, C)
            Its extremes; ``largest`` is 0 where the window is empty.
        window : Window
            The queries.
        """
        values = self.values[layer]
        values[..., _LARGEST, :] = largest
        values[..., _SMALLEST, :] = smallest * window.present
        values[..., _SUMS, :] = sums[..., :-1, :]
        values[..., _HISTORY, :] = values[..., _HISTORY, :] * window.fading + sums[..., :1, :]
        self.last[layer] = sums[..., -1, :]


class QueryMoments:
    """Mean and covariance of all queries so far, rotated back to position 0.

    Parameters
    ----------
    shape : tuple of int
        (L, N, H, G).
    head_dim : int
        D.
    rotary : Rotary
        The model's rotary embedding.
    dtype : torch.dtype
        At least float32.
    device : torch.device
        Where to keep them.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        head_dim: int,
        rotary: Rotary,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rotary = rotary
        self.count = torch.zeros(shape[0], shape[1], dtype=dtype, device=device)
        self.first = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.second = torch.zeros(*shape, head_dim, head_dim, dtype=dtype, device=device)

    def add(self, layer: int, query: Tensor, positions: Tensor, valid: Tensor) -> None:
        """Take in queries (N, H, G, S, D) at positions (N, S) where valid (N, S)."""
        flat = (
            self.rotary.unrotate(query.to(self.first.dtype), positions[:, None, None]) * valid[:, None, None, :, None]
        )
        self.count[layer] += valid.sum(dim=1)
        self.first[layer] += flat.sum(dim=3)
        self.second[layer] += flat.transpose(3, 4) @ flat

    def mean(self, layer: int) -> Tensor:
        """Return the mean (N, H, G, D) of a layer's queries."""
        return self.first[layer] / self.count[layer].clamp(min=1)[:, None, None, None]

    def covariance(self, layer: int) -> Tensor:
        """Return the covariance (N, H, G, D, D) of a layer's queries."""
        mean = self.mean(layer)
        second = self.second[layer] / self.count[layer].clamp(min=1)[:, None, None, None, None]
        return second - mean[..., :, None] * mean[..., None, :]

    def row_tensors(self) -> dict[str, tuple[Tensor, int]]:
        """Return the tensors by name with their row axis."""
        return {"query_count": (self.count, 1), "query_first": (self.first, 1), "query_second": (self.second, 1)}


def newest(x: Tensor, count: int, dim: int) -> Tensor:
    """Return the last ``count`` entries along a dimension, zeros before them where there are fewer."""
    have = x.shape[dim]
    if have >= count:
        return x.narrow(dim, have - count, count)
    shape = list(x.shape)
    shape[dim] = count - have
    return torch.cat((torch.zeros(shape, dtype=x.dtype, device=x.device), x), dim=dim)
