"""Golden Eviction's knowledge: the attention every pair will receive, from one full-cache pass, streaming.

ForesightKV (arXiv 2602.03203): block score = attention to a key, averaged over a window's queries and the group's query
heads; utility = the largest block score over the windows after the decision. KVP (arXiv 2602.10238, eq. of the reward):
the sum over future queries of the largest attention in the group. The T x T attention is never held: one window of
queries at a time is reduced, T * (T / W) per head is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv import fused
from kvenv.attention import BEYOND, HandedCache, attention_probabilities, causal_bias
from kvenv.decode import Batch, Losses, collate, feed, read
from kvenv.memory import side_by_side

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


@dataclass(frozen=True)
class Prefix:
    """Pairs that precede a forward call.

    Attributes
    ----------
    pairs : list of (Tensor, Tensor)
        Keys and values (N, H, P, D) of each layer.
    valid : Tensor (N, P) bool
        False where a column is padding.
    """

    pairs: list[tuple[Tensor, Tensor]]
    valid: Tensor

    def select(self, rows: Sequence[int], columns: int, copies: int) -> Prefix:
        """Return the first columns of some rows, each row ``copies`` times."""
        index = torch.as_tensor(rows, device=self.valid.device).repeat_interleave(copies)
        pairs = [(key[index, :, :columns], value[index, :, :columns]) for key, value in self.pairs]
        return Prefix(pairs, self.valid[index, :columns])


class WindowedCache(HandedCache):
    """A full cache for one forward call that attends window by window and shows the attention to who subclasses it.

    Parameters
    ----------
    model : PreTrainedModel
        The decoder.
    interval : int
        W, the width of a window.
    prefix : Prefix, optional
        P pairs per row that come before the S columns of the call.
    keep_pairs : bool
        Whether to keep all pairs, so that other calls can go on from them.

    Attributes
    ----------
    pairs : list of (Tensor, Tensor)
        Keys and values (N, H, P + S, D) by layer, if kept.
    """

    def __init__(
        self, model: PreTrainedModel, *, interval: int, prefix: Prefix | None = None, keep_pairs: bool = False
    ) -> None:
        super().__init__(model)
        self.interval, self.prefix, self.keep_pairs = interval, prefix, keep_pairs
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def begin(self, layer: int, like: Tensor, windows: int) -> None:
        """Make room for a layer: ``like`` is its keys (N, H, P + S, D), ``windows`` S / W."""
        raise NotImplementedError

    def see(self, layer: int, window: int, probabilities: Tensor, valid: Tensor) -> None:
        """Take in a window's attention (N, H, G, W, C) to the first C pairs; queries (N, W) may be padding."""
        raise NotImplementedError

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, padding: Tensor | None
    ) -> Tensor:
        """Attend causally, one window after the other."""
        if self._fed is None:
            raise ValueError(f"{type(self).__name__} sees one announced pass: feed it through kvenv.decode.feed")
        valid = seen = self._fed[1]
        if self.prefix is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self.prefix.pairs[layer], (key, value), strict=True))
            seen = torch.cat([self.prefix.valid, valid], dim=1)
        if self.keep_pairs:
            self.pairs.append((key, value))
        query = query.unflatten(1, (self.kv_heads, self.groups))
        columns, total = query.shape[3], key.shape[2]
        self.begin(layer, key, columns // self.interval)
        dtype = torch.promote_types(key.dtype, torch.float32)
        column = torch.arange(total, device=key.device).to(dtype)
        held = torch.where(seen, column, BEYOND)[:, None, None]
        outputs = []
        for start in range(0, columns, self.interval):
            window = slice(start, start + self.interval)
            stop = total - columns + window.stop
            pairs = key[:, :, :stop], value[:, :, :stop]
            places = column[stop - self.interval : stop, None], held[..., :stop]
            number = start // self.interval
            outputs.append(
                self._attend(layer, number, query[:, :, :, window], pairs, places, valid[:, window], scaling)
            )
        return torch.cat(outputs, dim=3).flatten(1, 2)

    def _attend(
        self,
        layer: int,
        window: int,
        query: Tensor,
        pairs: tuple[Tensor, Tensor],
        places: tuple[Tensor, Tensor],
        valid: Tensor,
        scaling: float,
    ) -> Tensor:
        """Attend with a window's queries (N, H, G, W, D) to the first C pairs, and show the attention.

        ``places`` are what :func:`causal_bias` takes: the reach of the queries and where the pairs are held.
        """
        key, value = pairs
        bias = causal_bias(*places, torch.promote_types(key.dtype, torch.float32))
        probabilities = attention_probabilities(query, key, bias, scaling)
        self.see(layer, window, probabilities, valid)
        return (probabilities.flatten(2, 3).to(value.dtype) @ value).view(query.shape)


class RecordingCache(WindowedCache):
    """A full cache for one forward call that reduces attention to block scores window by window.

    Parameters
    ----------
    model, interval, prefix, keep_pairs
        As in :class:`WindowedCache`.
    reduce : {"max", "sum"}
        ForesightKV's block mean, or KVP's sum over queries of the maximum over the group.

    Attributes
    ----------
    scores : list of Tensor (N, H, S / W + 1, P + S)
        Block score of every pair in each window, by layer; all zero behind the last window.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        interval: int,
        reduce: Reduce = "max",
        prefix: Prefix | None = None,
        keep_pairs: bool = False,
    ) -> None:
        if reduce not in ("max", "sum"):
            raise ValueError(f"reduce {reduce!r} is unknown: known are max, sum")
        super().__init__(model, interval=interval, prefix=prefix, keep_pairs=keep_pairs)
        self.reduce = reduce
        self.scores: list[Tensor] = []

    def begin(self, layer: int, like: Tensor, windows: int) -> None:
        """Append the layer's block scores, of no window yet, and of one behind the last."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.scores.append(torch.zeros(*like.shape[:2], windows + 1, like.shape[2], dtype=dtype, device=like.device))

    def see(self, layer: int, window: int, probabilities: Tensor, valid: Tensor) -> None:
        """Keep the block scores of a window: over its valid queries and the group."""
        weights = valid.to(probabilities.dtype)[:, None, :, None]
        if self.reduce == "sum":
            score = (probabilities.amax(dim=2) * weights).sum(dim=2)
        else:
            score = (probabilities.mean(dim=2) * weights).sum(dim=2) / weights.sum(dim=2).clamp(min=1)
        self._keep(layer, window, score)

    def _keep(self, layer: int, window: int, score: Tensor) -> None:
        """Keep the block scores (N, H, C) of a window."""
        self.scores[layer][:, :, window, : score.shape[-1]] = score

    def _attend(
        self,
        layer: int,
        window: int,
        query: Tensor,
        pairs: tuple[Tensor, Tensor],
        places: tuple[Tensor, Tensor],
        valid: Tensor,
        scaling: float,
    ) -> Tensor:
        """Attend and keep the block scores, fused where that is possible."""
        if not fused.serves(query):
            return super()._attend(layer, window, query, pairs, places, valid, scaling)
        weights = valid.to(self.scores[layer].dtype)[:, None]
        if self.reduce == "max":
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)
        attended = fused.attend(query, *pairs, *places, weights, scaling, largest_of_group=self.reduce == "sum")
        self._keep(layer, window, attended.sums[..., 0, :].mean(dim=2))
        return attended.output

    def future(self, pad: Tensor) -> FutureAttention:
        """Return the utilities after the pass; the block scores are turned into them in place."""
        add = torch.maximum if self.reduce == "max" else torch.add
        utility = torch.stack(self.scores)
        self.scores = []
        by_window = utility.unbind(dim=3)
        for earlier, later in zip(by_window[-2::-1], by_window[::-1]):
            add(earlier, later, out=earlier)
        return FutureAttention(utility, pad, self.interval)


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

    Raises
    ------
    MemoryError
        If memory runs out.
    """
    with side_by_side(len(traces), max(map(len, traces))):
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
    """Average the golden utility over resampled continuations: what a causal policy can know.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM on kvenv's attention.
    traces : sequence of array (T_n,)
        The traces whose decisions are asked for.
    continuations : nested sequence
        ``continuations[n][k]``: traces that share the first ``anchors[n] + k * interval`` tokens with trace n, equally
        many for every n and k. Only what follows those tokens is fed; the trace's own pass gives the pairs before.
    interval, anchors, reduce
        As in :func:`future_attention`.

    Returns
    -------
    FutureAttention
        Like golden's, expected.
    """
    batch = collate(traces, anchors=anchors, interval=interval, device=model.device)
    whole = RecordingCache(model, interval=interval, keep_pairs=True)
    feed(model, whole, batch.tokens, batch.targets, batch.positions, batch.valid)
    pairs = Prefix(whole.pairs, batch.valid)
    rows, columns = batch.tokens.shape
    shape = (whole.num_layers, rows, whole.kv_heads, columns // interval + 1, columns)
    utility = torch.zeros(shape, device=model.device, dtype=whole.scores[0].dtype)
    first = int(batch.pad[0]) + anchors[0]
    for k in range(max(len(decisions) for decisions in continuations)):
        cut = first + k * interval
        due = [row for row, decisions in enumerate(continuations) if k < len(decisions)]
        futures = [future for row in due for future in continuations[row][k]]
        copies = len(futures) // len(due)
        group = collate(
            futures,
            anchors=[anchors[row] for row in due for _ in range(copies)],
            interval=interval,
            device=model.device,
        )
        begin = int(group.pad[0]) + anchors[due[0]] + k * interval
        cache = RecordingCache(model, interval=interval, reduce=reduce, prefix=pairs.select(due, cut, copies))
        tokens, positions, valid = (x[:, begin:] for x in (group.tokens, group.positions, group.valid))
        read(model, cache, tokens, positions, valid)
        after = cache.future(group.pad).utility[..., 0, :cut]
        utility[:, due, :, cut // interval, :cut] = after.unflatten(1, (len(due), copies)).mean(dim=2)
    return FutureAttention(utility, batch.pad, interval)
