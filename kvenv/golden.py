"""Golden Eviction's knowledge: the attention every pair will receive, from one full-cache pass, streaming.

ForesightKV (arXiv 2602.03203): block score = attention to a key, averaged over a window's queries and the group's query
heads; utility = the largest block score over the windows after the decision. KVP (arXiv 2602.10238, eq. of the reward):
the sum over future queries of the largest attention in the group. The T x T attention is never held: one window of
queries at a time is reduced, T * (T / W) per head is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.attention import HandedCache, attend_block, attention_probabilities
from kvenv.decode import Batch, Losses, collate, feed

Reduce = Literal["max", "sum"]


class FutureAttention:
    """Golden utilities of every pair at every decision.

    Parameters
    ----------
    utility : Tensor (L, N, H, J + 1, S)
        Utility at the decision before window j of the pair in column c; the last window is all zero.
    pad : Tensor (N,) int64
        Column of a row's position 0.
    interval : int
        W.
    """

    def __init__(self, utility: Tensor, pad: Tensor, interval: int) -> None:
        self.utility, self.pad, self.interval = utility, pad, interval

    def at(self, layer: int, positions: Tensor, next_position: Tensor) -> Tensor:
        """Return the utilities (N, H, C) of a layer's pairs at the decision before ``next_position`` (N,)."""
        window = torch.div(next_position + self.pad, self.interval, rounding_mode="floor")
        utility = self.utility[layer]
        window = window.clamp(max=utility.shape[2] - 1)[:, None, None, None].expand(
            -1, utility.shape[1], 1, utility.shape[3]
        )
        rows = utility.gather(2, window).squeeze(2)
        columns = (positions + self.pad[:, None, None]).clamp(0, utility.shape[3] - 1)
        return rows.gather(-1, columns)


class RecordingCache(HandedCache):
    """A full cache for one forward call that reduces attention to block scores window by window.

    Parameters
    ----------
    model : PreTrainedModel
        The decoder.
    interval : int
        W, the width of a window.
    reduce : {"max", "sum"}
        ForesightKV's block mean, or KVP's sum over queries of the maximum over the group.
    first_window : int
        Windows before this one are attended but not recorded.
    """

    def __init__(self, model: PreTrainedModel, *, interval: int, reduce: Reduce = "max", first_window: int = 0) -> None:
        if reduce not in ("max", "sum"):
            raise ValueError(f"reduce {reduce!r} is unknown: known are max, sum")
        super().__init__(model)
        self.interval, self.reduce, self.first_window = interval, reduce, first_window
        self.scores: list[Tensor] = []
        self._fed: tuple[Tensor, Tensor] | None = None

    def expect(self, positions: Tensor, valid: Tensor) -> None:
        """Say what the forward call feeds, as :meth:`kvenv.cache.EvictingCache.expect`."""
        self._fed = (positions, valid)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, padding: Tensor | None
    ) -> Tensor:
        """Attend causally; keep the block scores of each recorded window."""
        if self._fed is None:
            raise ValueError("RecordingCache records one announced pass: feed it through kvenv.decode.feed")
        positions, valid = self._fed
        query = query.unflatten(1, (self.kv_heads, self.groups))
        columns, first = query.shape[3], self.first_window * self.interval
        scores = torch.zeros(
            *key.shape[:2],
            columns // self.interval,
            columns,
            dtype=torch.promote_types(key.dtype, torch.float32),
            device=key.device,
        )
        outputs = [self._plain(query, key, value, positions, valid, first, scaling)] if first else []
        for start in range(first, columns, self.interval):
            stop = start + self.interval
            allowed = valid[:, None, None, :stop] & (
                positions[:, None, None, :stop] <= positions[:, None, start:stop, None]
            )
            probabilities = attention_probabilities(query[:, :, :, start:stop], key[:, :, :stop], allowed, scaling)
            scores[:, :, start // self.interval, :stop] = self._block_score(probabilities, valid[:, start:stop])
            mixed = probabilities.flatten(2, 3).to(value.dtype) @ value[:, :, :stop]
            outputs.append(mixed.view(*query.shape[:3], self.interval, -1))
        self.scores.append(scores)
        return torch.cat(outputs, dim=3).flatten(1, 2)

    def _plain(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, valid: Tensor, stop: int, scaling: float
    ) -> Tensor:
        """Attention output of the first ``stop`` columns, nothing recorded."""
        allowed = valid[:, None, None, :stop] & (positions[:, None, None, :stop] <= positions[:, None, :stop, None])
        return attend_block(query[:, :, :, :stop], key[:, :, :stop], value[:, :, :stop], allowed, scaling)

    def _block_score(self, probabilities: Tensor, valid: Tensor) -> Tensor:
        """Reduce a window's attention (N, H, G, W, C) over its valid queries and the group to (N, H, C)."""
        weights = valid.to(probabilities.dtype)[:, None, :, None]
        if self.reduce == "sum":
            return (probabilities.amax(dim=2) * weights).sum(dim=2)
        return (probabilities.mean(dim=2) * weights).sum(dim=2) / weights.sum(dim=2).clamp(min=1)

    def future(self, pad: Tensor) -> FutureAttention:
        """Return the utilities after the pass; the block scores are turned into them in place, layer by layer."""
        utilities = []
        for scores in self.scores:
            backwards = scores.flip(2)
            total = backwards.cummax(dim=2).values if self.reduce == "max" else backwards.cumsum(dim=2)
            utilities.append(torch.nn.functional.pad(total.flip(2), (0, 0, 0, 1)))
        self.scores = []
        return FutureAttention(torch.stack(utilities), pad, self.interval)


def future_attention(
    model: PreTrainedModel,
    traces: Sequence[np.ndarray],
    *,
    interval: int,
    anchors: Sequence[int] | int,
    reduce: Reduce = "max",
) -> tuple[FutureAttention, Losses, Batch]:
    """Run traces through the full cache once and return the golden utilities.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM on kvenv's attention.
    traces : sequence of array (T_n,)
        Token ids.
    interval : int
        W.
    anchors : int or sequence of int
        Position of the first decision (the capacity): windows are aligned with it.
    reduce : {"max", "sum"}
        See :class:`RecordingCache`.

    Returns
    -------
    FutureAttention
        Utilities at every decision.
    Losses
        Full-cache losses, per column of the batch.
    Batch
        The batch that was fed.
    """
    batch = collate(traces, anchors=anchors, interval=interval, device=model.device)
    cache = RecordingCache(model, interval=interval, reduce=reduce)
    losses = feed(model, cache, batch.tokens, batch.targets, batch.positions, batch.valid)
    return cache.future(batch.pad), losses, batch


def expected_future(
    model: PreTrainedModel,
    traces: Sequence[np.ndarray],
    continuations: Sequence[Sequence[Sequence[np.ndarray]]],
    *,
    interval: int,
    anchors: Sequence[int],
    reduce: Reduce = "max",
) -> FutureAttention:
    """Average the golden utility over resampled continuations: the ceiling for any causal policy.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM on kvenv's attention.
    traces : sequence of array (T_n,)
        The traces whose decisions are asked for.
    continuations : nested sequence
        ``continuations[n][k]``: traces that share the first ``anchors[n] + k * interval`` tokens with trace n.
    interval, anchors, reduce
        As in :func:`future_attention`.

    Returns
    -------
    FutureAttention
        Like golden's, expected.
    """
    batch = collate(traces, anchors=anchors, interval=interval, device=model.device)
    windows, columns = batch.tokens.shape[1] // interval, batch.tokens.shape[1]
    probe = RecordingCache(model, interval=interval)
    utility = torch.zeros(
        probe.num_layers,
        len(traces),
        probe.kv_heads,
        windows + 1,
        columns,
        device=model.device,
        dtype=torch.promote_types(model.dtype, torch.float32),
    )
    for row, decisions in enumerate(continuations):
        first = (anchors[row] + int(batch.pad[row])) // interval
        for k, futures in enumerate(decisions):
            group = collate(futures, anchors=anchors[row], interval=interval, device=model.device)
            cache = RecordingCache(
                model, interval=interval, reduce=reduce, first_window=(anchors[row] + int(group.pad[0])) // interval + k
            )
            feed(model, cache, group.tokens, group.targets, group.positions, group.valid)
            at = cache.future(group.pad).utility[:, :, :, cache.first_window].mean(dim=1)
            shift = int(batch.pad[row] - group.pad[0])
            kept = min(columns - shift, at.shape[-1])
            utility[:, row, :, first + k, shift : shift + kept] = at[..., :kept]
    return FutureAttention(utility, batch.pad, interval)
