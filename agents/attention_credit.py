"""Who is to blame for a loss: evicted pairs, as far as the query that lost would have attended to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from agents.ranking_policy import Evictions
from kvenv.decode import collate, feed
from kvenv.golden import WindowedCache
from kvenv.traces import Trace


class BlameCache(WindowedCache):
    """A full cache that weighs attention to evicted pairs by what the queries' targets were paid.

    Parameters
    ----------
    model : PreTrainedModel
        The decoder.
    paid : Tensor (M, G, S)
        By column of the query: what G rollouts of each of M rows were paid for its target.
    gone : list of Tensor (M, G, H, S) int
        By layer and column of the pair: the window from whose first query on it is missing.
    interval : int
        W.

    Attributes
    ----------
    credit : list of Tensor (M, G, H, S)
        By layer and column of the pair: the sum over queries that miss it of paid * attention, averaged over the group.
    """

    def __init__(self, model: PreTrainedModel, paid: Tensor, gone: list[Tensor], interval: int) -> None:
        super().__init__(model, interval=interval)
        self.paid, self.gone = paid, gone
        self.credit: list[Tensor] = []

    def begin(self, layer: int, like: Tensor, windows: int) -> None:
        """Append the layer's credit."""
        self.credit.append(torch.zeros(self.gone[layer].shape, dtype=self.paid.dtype, device=like.device))

    def see(self, layer: int, window: int, probabilities: Tensor, valid: Tensor) -> None:
        """Add what a window's queries would have seen of pairs that are gone."""
        paid = self.paid[:, :, window * self.interval : (window + 1) * self.interval]
        paid = torch.where(valid[:, None], paid, 0.0)
        credit = torch.einsum("mgw,mhwc->mghc", paid, probabilities.mean(dim=2).to(paid.dtype))
        stop = credit.shape[-1]
        self.credit[layer][..., :stop] += torch.where(self.gone[layer][..., :stop] <= window, credit, 0.0)


def attention_credit(
    model: PreTrainedModel,
    traces: Sequence[Trace],
    evictions: Evictions,
    paid: Tensor,
    capacity: int,
) -> list[Tensor]:
    """Return what the eviction of each pair of each rollout is credited with.

    A pick gets the sum over all later queries of (what their targets were paid) * (their attention to the evicted pair
    under the full cache, averaged over the group's query heads): a pick that no query misses gets nothing, whatever
    else went wrong in its rollout.

    Parameters
    ----------
    model : PreTrainedModel
        Makes the full-cache run, once per trace.
    traces : sequence of Trace
        The M traces.
    evictions : Evictions
        Of N = M * G rollouts, those of a trace side by side.
    paid : Tensor (N, J * W)
        By target, from position C + 1 on: what it paid beyond the other rollouts of its trace.
    capacity : int
        C, the position of the first decision.

    Returns
    -------
    list of Tensor (N, H, P)
        By layer and position of the pair, up to the last one fed; 0 if it wasn't evicted.
    """
    interval = evictions.interval
    batch = collate([trace.tokens for trace in traces], anchors=capacity, interval=interval, device=model.device)
    pad, columns = int(batch.pad[0]), batch.tokens.shape[1]
    first = capacity + pad
    by_column = torch.nn.functional.pad(paid[:, : columns - first], (first, max(0, columns - first - paid.shape[1])))
    gone = [
        _gone(layer, first // interval, pad, columns).unflatten(0, (len(traces), -1)) for layer in evictions.positions
    ]
    cache = BlameCache(model, by_column.unflatten(0, (len(traces), -1)), gone, interval)
    feed(model, cache, batch.tokens, batch.targets, batch.positions, batch.valid)
    return [credit.flatten(0, 1)[..., pad:] for credit in cache.credit]


def _gone(went: Sequence[Tensor], first: int, pad: int, columns: int) -> Tensor:
    """Return the window (N, H, S) from which on each column's pair is missing; a number beyond the last if it stays."""
    gone = went[0].new_full((*went[0].shape[:2], columns + 1), columns)
    for decision, positions in enumerate(went):
        gone.scatter_(-1, torch.where(positions >= 0, positions + pad, columns).long(), first + decision)
    return gone[..., :columns]
