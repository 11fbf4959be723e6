"""What full-cache passes tell of rows' traces: losses and golden utilities, computed when they are asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.decode import full_cache_losses
from kvenv.golden import FutureAttention, Reduce, expected_future, future_attention
from kvenv.rewards import FullLosses, low_entropy
from kvenv.traces import TraceSource

Kind = Literal["future", "expected_future"]
KINDS: tuple[Kind, ...] = ("future", "expected_future")

CONTINUATIONS = 16
"""Continuations that ``expected_future`` averages over."""

TRACES_AT_ONCE = 16
"""Traces in one full-cache pass."""

LOSSES_KEPT = 4096
"""Traces whose full-cache losses are kept."""


def resampled(source: TraceSource, trace_id: int, cuts: Sequence[int]) -> list[list[np.ndarray]]:
    """Return the tokens of a trace's continuations at each cut, as :func:`kvenv.golden.expected_future` reads them."""
    return [[future.tokens for future in source.continuations(trace_id, cut, CONTINUATIONS)] for cut in cuts]


class FullRows:
    """Full-cache losses of the traces that rows run now.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM on kvenv's attention.
    source : TraceSource
        Gives traces by id.
    rows, columns : int
        N, and one more than the largest target position asked for.
    """

    def __init__(self, model: PreTrainedModel, source: TraceSource, *, rows: int, columns: int) -> None:
        self.model, self.source = model, source
        dtype = torch.promote_types(model.dtype, torch.float32)
        self._nll = torch.zeros(rows, columns, dtype=dtype, device=model.device)
        self._entropy = torch.zeros_like(self._nll)
        self._low = torch.zeros_like(self._nll, dtype=torch.bool)
        self._low_count = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self._held: list[tuple[int, int] | None] = [None] * rows
        self._kept: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def at(self, traces: np.ndarray, anchors: np.ndarray, targets: Tensor, valid: Tensor) -> FullLosses:
        """Return the losses of targets (N, S), zero where not valid.

        Parameters
        ----------
        traces, anchors : array (N,) of int
            Trace id of each row and the position of its first decision, after which targets are scored.
        targets, valid : Tensor (N, S)
            Positions of the targets.
        """
        stale = [row for row, key in enumerate(zip(traces.tolist(), anchors.tolist())) if self._held[row] != key]
        if stale:
            self._run(sorted({int(traces[row]) for row in stale} - set(self._kept)))
        for row in stale:
            self._fill(row, int(traces[row]), int(anchors[row]))
        if stale:
            while len(self._kept) > LOSSES_KEPT:
                self._kept.popitem(last=False)
        return FullLosses(
            nll=self._nll.gather(1, targets) * valid,
            entropy=self._entropy.gather(1, targets) * valid,
            low_entropy=self._low.gather(1, targets) & valid,
            low_entropy_count=self._low_count.clone(),
        )

    def _run(self, traces: list[int]) -> None:
        """Pass traces through the full cache."""
        for start in range(0, len(traces), TRACES_AT_ONCE):
            group = traces[start : start + TRACES_AT_ONCE]
            losses = full_cache_losses(self.model, [self.source[trace].tokens for trace in group])
            for row, trace in enumerate(group):
                scored = len(self.source[trace].tokens) - 1
                self._kept[trace] = (losses.nll[row, :scored].clone(), losses.entropy[row, :scored].clone())

    def _fill(self, row: int, trace: int, anchor: int) -> None:
        """Make a row's table from its trace's losses."""
        nll, entropy = self._kept[trace]
        self._kept.move_to_end(trace)
        stop = nll.shape[0] + 1
        self._nll[row, 1:stop], self._entropy[row, 1:stop] = nll, entropy
        self._low[row] = False
        low = low_entropy(entropy[anchor:])
        self._low[row, anchor + 1 : stop] = low
        self._low_count[row] = low.sum()
        self._held[row] = (trace, anchor)


class FutureRows:
    """Golden utilities of the traces that rows run now.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM on kvenv's attention.
    source : TraceSource
        Gives traces by id, and continuations for ``expected_future``.
    rows : int
        N.
    latest_anchor : int
        Largest position of a first decision.
    interval, trace_length : int
        W, and the longest trace.
    decisions : int or None
        Decisions of an episode, None for one every W tokens.
    kind : {"future", "expected_future"}
        Of the trace itself, or averaged over 16 continuations of the same prefix at every decision.
    reduce : {"max", "sum"}
        See :mod:`kvenv.golden`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: TraceSource,
        *,
        rows: int,
        latest_anchor: int,
        interval: int,
        trace_length: int,
        decisions: int | None,
        kind: Kind,
        reduce: Reduce,
    ) -> None:
        self.model, self.source, self.interval = model, source, interval
        self.decisions, self.kind, self.reduce = decisions, kind, reduce
        self.boundary = _round_up(latest_anchor, interval)
        self.columns = self.boundary + _round_up(trace_length, interval)
        self._rows = rows
        self._held: list[tuple[int, int] | None] = [None] * rows
        self._table: FutureAttention | None = None

    def of(self, traces: np.ndarray, anchors: np.ndarray) -> FutureAttention:
        """Return the utilities of each row's trace, arrays (N,) of trace ids and positions of the first decision.

        Raises
        ------
        ValueError
            If the traces can't be continued otherwise.
        """
        stale: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(traces.tolist(), anchors.tolist())):
            if self._held[row] != key:
                stale.setdefault(key, []).append(row)
        keys = list(stale)
        for start in range(0, len(keys), TRACES_AT_ONCE):
            group = keys[start : start + TRACES_AT_ONCE]
            self._fill([stale[key] for key in group], group)
        if self._table is None:
            raise ValueError("nothing is decided before reset: call reset first")
        return self._table

    def _fill(self, rows: list[list[int]], keys: list[tuple[int, int]]) -> None:
        """Compute the utilities of some traces and write them to every row that runs one of them."""
        anchors = [anchor for _, anchor in keys]
        computed = self._compute([trace for trace, _ in keys], anchors)
        # Their first decisions share a column, which need not be this table's.
        shift = self.boundary - _round_up(max(anchors), self.interval)
        table = self._allocate(computed)
        windows, columns = computed.utility.shape[-2:]
        skipped = shift // self.interval
        for index, (own, anchor) in enumerate(zip(rows, anchors)):
            for row in own:
                table.utility[:, row] = 0
                table.utility[:, row, :, skipped : skipped + windows, shift : shift + columns] = computed.utility[
                    :, index
                ]
                table.pad[row] = self.boundary - anchor
                self._held[row] = keys[index]

    def _allocate(self, like: FutureAttention) -> FutureAttention:
        """Return the table of all rows."""
        if self._table is None:
            layers, _, heads = like.utility.shape[:3]
            shape = (layers, self._rows, heads, self.columns // self.interval + 1, self.columns)
            pad = torch.zeros(self._rows, dtype=torch.int64, device=like.utility.device)
            self._table = FutureAttention(like.utility.new_zeros(shape), pad, self.interval)
        return self._table

    def _compute(self, traces: list[int], anchors: list[int]) -> FutureAttention:
        tokens = [self.source[trace].tokens for trace in traces]
        if self.kind == "future":
            return future_attention(self.model, tokens, interval=self.interval, anchors=anchors, reduce=self.reduce)[0]
        continuations = [
            resampled(self.source, trace, range(anchor, len(own) - 1, self.interval)[: self.decisions])
            for trace, anchor, own in zip(traces, anchors, tokens)
        ]
        return expected_future(
            self.model, tokens, continuations, interval=self.interval, anchors=anchors, reduce=self.reduce
        )


def _round_up(x: int, step: int) -> int:
    return -(-x // step) * step
