"""The dynamics of KVEvict-v0: N traces through one frozen LLM; evict, feed a window, score it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from kvenv.attention import HandedCache
from kvenv.cache import SlotCache
from kvenv.checks import check_choice
from kvenv.decode import collate, feed, read
from kvenv.features import FeatureSet, Observation
from kvenv.golden import Reduce
from kvenv.graphs import Call, Graphs, refuse_what_cannot_be_captured
from kvenv.limits import Limits, observation_nbytes, refuse_what_cannot_fit
from kvenv.lookahead import KINDS, FullRows, FutureRows, Kind
from kvenv.memory import side_by_side
from kvenv.models import LoadedModel, check_tokens
from kvenv.rewards import WindowLosses
from kvenv.snapshot import Counters, Snapshot
from kvenv.state import LayerState, check_needs
from kvenv.traces import Trace, TraceSource

FOLLOWED = frozenset({"stats", "last_attention", "queries", "query_moments"})
"""Parts of a layer's state that the cache must follow from the first token on; the others are computed when asked."""

REST_AT_ONCE = 256
"""Tokens that the schedule ``prefill`` decodes in one call."""


class Dynamics:
    """N rows that each decode a trace.

    Parameters
    ----------
    loaded : LoadedModel
        The LLM.
    source : TraceSource
        Gives traces by id.
    rows : int
        N.
    limits : Limits
        Budget, windows and lengths.
    features : FeatureSet
        What observations hold.
    cuda_graph : bool
        Capture what a step asks of the device, and the observation, in CUDA graphs.

    Raises
    ------
    ValueError
        If no trace of that length can be decoded with that budget, the observations don't fit in memory, or steps can't
        be captured.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        source: TraceSource,
        *,
        rows: int,
        limits: Limits,
        features: FeatureSet,
        cuda_graph: bool = False,
    ) -> None:
        self.loaded, self.model, self.source = loaded, loaded.model, source
        self.rows, self.limits, self.features = rows, limits, features
        loaded.check_length(limits.trace_length)
        self.capacity = limits.capacity(source)
        shape = HandedCache(self.model)
        width = features.width(shape.head_dim, shape.groups)
        self.feature_shape = (shape.num_layers, shape.kv_heads, self.capacity, width)
        refuse_what_cannot_fit(rows, observation_nbytes(*self.feature_shape), features.name, self.model.device)
        if cuda_graph:
            refuse_what_cannot_be_captured(self.model, limits.periodic)
        self.counters = Counters.blank(rows)
        device, columns = self.model.device, limits.trace_length + limits.interval + 1
        self.tokens = torch.zeros(rows, columns, dtype=torch.int64, device=device)
        self.answer = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        self.last = torch.zeros(rows, dtype=torch.int64, device=device)
        self.finished = torch.ones(rows, dtype=torch.bool, device=device)
        self.truncated = torch.zeros_like(self.finished)
        self._everyone = torch.ones_like(self.finished)
        self._answers_before = np.zeros((rows, columns + 1), np.int64)
        self._full: FullRows | None = None
        self._futures: dict[tuple[Kind, Reduce], FutureRows] = {}
        self._cuda_graph = cuda_graph
        self._take(self._new_cache(rows, self.capacity, features.needs & FOLLOWED))

    @torch.no_grad()
    def begin(
        self,
        rows: np.ndarray,
        traces: Sequence[int],
        budgets: Sequence[int],
        seeds: Sequence[int],
        rollouts: Sequence[int],
    ) -> None:
        """Start an episode in some rows: feed the first tokens of their traces, up to the first decision.

        Parameters
        ----------
        rows : array of int
            Which rows.
        traces, budgets, seeds, rollouts : sequence of int
            One of each per row: trace id, B, seed and rollout number of the noise.

        Raises
        ------
        ValueError
            If a trace can't be decoded with its budget.
        MemoryError
            If memory runs out.
        """
        loaded = [self._trace(trace) for trace in traces]
        for trace, budget in zip(loaded, budgets, strict=True):
            self._check_trace(trace, budget)
        anchors = [self.limits.anchor(trace, budget) for trace, budget in zip(loaded, budgets, strict=True)]
        last = [len(trace.tokens) - 1 for trace in loaded]
        self.counters.set(rows, trace=traces, budget=budgets, seed=seeds, rollout=rollouts, anchor=anchors)
        self.counters.set(rows, position=anchors, last=last, steps=0, finished=False, truncated=False)
        self._write_rows(rows, loaded)
        with self._memory():
            self._prefill(rows, loaded)

    @torch.no_grad()
    def advance(self, priorities: Tensor) -> tuple[WindowLosses, Tensor]:
        """Evict every row down to its budget, then decode and score what comes up to the next decision.

        Finished rows idle.

        Parameters
        ----------
        priorities : Tensor (L, N, H, C)
            Higher means keep.

        Returns
        -------
        WindowLosses
            Of the targets p + 1 ... p + W after position p.
        Tensor (N, L, H, E) int64
            Evicted positions in order, -1 beyond each head's count.
        """
        with self._memory():
            scored = self._run("turn", self._turn, priorities)
        evicted, window = scored.pop("evicted"), self._window(scored)
        now = self.counters
        active = ~now.finished
        now.steps[:] += active
        now.position[:] += active * np.minimum(window.nll.shape[1], now.last - now.position)
        now.finished[:] |= now.position >= now.last
        return window, evicted

    def observe(self) -> Observation:
        """Return the observation of every row."""
        with self._memory():
            return self._run("observe", lambda: self.features.observe(self.cache))

    def truncate(self, rows: np.ndarray) -> None:
        """End the episodes of some rows (indices) before their traces end."""
        if len(rows):
            self.counters.set(rows, truncated=True, finished=True)
            where = torch.as_tensor(rows, device=self.finished.device)
            self.finished[where] = self.truncated[where] = True

    def answers(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Return how many answer targets each row has at positions start + 1 ... stop, arrays (N,)."""
        rows = np.arange(self.rows)
        return self._answers_before[rows, stop + 1] - self._answers_before[rows, start + 1]

    def track(self, needs: Collection[str]) -> None:
        """Let the cache follow more of a layer's state; rows that are at their first decision are prefilled anew.

        Raises
        ------
        ValueError
            If a need is unknown, or an episode is under way whose past wasn't followed.
        """
        missing = (check_needs(needs) & FOLLOWED) - self.needs
        if not missing:
            return
        begun = np.flatnonzero(self.counters.trace >= 0)
        if (self.counters.steps[begun] > 0).any():
            raise ValueError(
                f"needs {sorted(missing)} must be followed from the first token on, and an episode is under way: "
                "call track(needs) before the first step"
            )
        self._take(self._new_cache(self.rows, self.capacity, self.needs | missing))
        if len(begun):
            self._prefill(begun, [self._trace(trace) for trace in self.counters.trace[begun]])

    @torch.no_grad()
    def layer_states(self, needs: Collection[str], reduce: Reduce = "max") -> Iterator[LayerState]:
        """Return what a policy with those needs sees, layer by layer, at the current decision of every row.

        Parameters
        ----------
        needs : collection of str
            Optional parts of the state, see :data:`kvenv.state.NEEDS`.
        reduce : {"max", "sum"}
            Golden utility: ForesightKV's or KVP's, see :mod:`kvenv.golden`.

        Raises
        ------
        ValueError
            As :meth:`track`, if ``reduce`` is neither, or if the traces can't be continued otherwise for
            ``expected_future``.
        """
        check_choice("reduce", reduce, get_args(Reduce))
        self.track(needs)
        traces, anchors = self.counters.trace, self.counters.anchor
        with self._memory():
            futures = {kind: self._future(kind, reduce).of(traces, anchors) for kind in KINDS if kind in needs}

        def state_of(layer: int) -> LayerState:
            state = self.cache.layer_state(layer, needs=needs)
            at = {kind: future.at(layer, state.positions, state.next_position) for kind, future in futures.items()}
            return replace(state, future=at.get("future"), expected_future=at.get("expected_future"))

        return map(state_of, range(self.cache.num_layers))

    def snapshot(self) -> Snapshot:
        """Return a copy of all rows' state."""
        tensors = {name: tensor.clone() for name, (tensor, _) in self.cache.row_tensors().items()}
        return Snapshot(self.arguments(), self.needs, tensors, self.counters.copy())

    def restore(self, snapshot: Snapshot) -> None:
        """Take all rows back to a snapshot that was taken with the same arguments.

        Raises
        ------
        ValueError
            If it isn't whole. Then nothing has changed.
        """
        needs, observed = check_needs(snapshot.needs), self.features.needs & FOLLOWED
        if not observed <= needs <= FOLLOWED:
            raise ValueError(f"the snapshot follows {sorted(needs)}: {sorted(observed)} must be among them")
        cache = self.cache if needs == self.needs else self._new_cache(self.rows, self.capacity, needs)
        own = {name: tensor for name, (tensor, _) in cache.row_tensors().items()}
        snapshot.check_tensors(own)
        begun, traces = self._episodes(snapshot.counters)
        if cache is not self.cache:
            self._take(cache)
        for name, tensor in own.items():
            tensor.copy_(snapshot.tensors[name])
        self.counters = snapshot.counters.copy()
        self._write_rows(begun, traces)

    def _episodes(self, now: Counters) -> tuple[np.ndarray, list[Trace]]:
        """Return the rows that counters say are in episodes, and their traces; refuse what no episode can be at."""
        if not isinstance(now, Counters):
            raise ValueError(f"the snapshot's counters are of type {type(now).__name__}")
        now.check(self.rows)
        begun = np.flatnonzero(now.trace >= 0)
        traces = [self._trace(trace) for trace in now.trace[begun]]
        for row, trace in zip(begun, traces, strict=True):
            budget, last = int(now.budget[row]), len(trace.tokens) - 1
            self._check_trace(trace, budget)
            anchor = self.limits.anchor(trace, budget)
            known = budget <= self.limits.budget and (now.anchor[row], now.last[row]) == (anchor, last)
            if not known or not anchor <= now.position[row] <= last or now.steps[row] < 0:
                raise ValueError(f"the snapshot's counters of row {row} are of no episode of trace {trace.name!r}")
        return begun, traces

    def arguments(self) -> dict[str, object]:
        """Return what two environments must share to exchange snapshots."""
        mine = {"rows": self.rows} | vars(self.limits) | {"capacity": self.capacity}
        return mine | {"model": self.loaded.name, "traces": self.source.name, "split": self.source.split}

    def _trace(self, trace: int) -> Trace:
        """Return a trace by id."""
        try:
            return self.source[int(trace)]
        except IndexError as error:
            raise ValueError(str(error)) from error

    def _take(self, cache: SlotCache) -> None:
        """Take a cache of all rows and follow what it follows; what was captured over another is void."""
        self.cache, self.needs = cache, cache.needs
        state = [tensor for tensor, _ in self.cache.row_tensors().values()]
        self.graphs = Graphs(self.model.device, [*state, self.finished]) if self._cuda_graph else None

    def _memory(self) -> AbstractContextManager[None]:
        """Return a context in which running out of memory names rows and tokens."""
        return side_by_side(self.rows, self.limits.trace_length)

    def _new_cache(self, rows: int, capacity: int, needs: Collection[str] | None = None) -> SlotCache:
        """Return an empty cache that follows ``needs``, this environment's if not given."""
        with self._memory():
            return SlotCache(
                self.model,
                rows=rows,
                capacity=capacity,
                interval=self.limits.interval,
                budget=self.limits.budget,
                needs=self.needs if needs is None else needs,
                protection=self.limits.protection,
            )

    def _write_rows(self, rows: np.ndarray, traces: list[Trace]) -> None:
        """Put tokens, answer spans and lengths of traces where a step finds them."""
        if not traces:
            return
        columns = self.tokens.shape[1]
        tokens, answer = np.zeros((len(rows), columns), np.int64), np.zeros((len(rows), columns), np.bool_)
        for index, trace in enumerate(traces):
            tokens[index, : len(trace.tokens)] = trace.tokens
            for start, stop in trace.answers:
                answer[index, start:stop] = True
        self._answers_before[rows, 1:] = answer.cumsum(axis=1)
        where = torch.as_tensor(rows, device=self.tokens.device)
        for target, value in (
            (self.tokens, tokens),
            (self.answer, answer),
            (self.last, self.counters.last[rows]),
            (self.finished, self.counters.finished[rows]),
            (self.truncated, self.counters.truncated[rows]),
        ):
            target[where] = torch.as_tensor(value, device=target.device)

    def _prefill(self, rows: np.ndarray, traces: list[Trace]) -> None:
        """Feed traces up to their first decision, in a cache of just these rows that then replaces them."""
        now, device = self.counters, self.model.device
        batch = collate(
            [trace.tokens for trace in traces],
            prompt_lengths=[trace.prompt_length for trace in traces],
            anchors=now.anchor[rows],
            interval=self.limits.interval,
            stop=-1,
            device=device,
        )
        fresh = self._new_cache(len(rows), self.capacity)
        fresh.prompt_length = batch.prompt_length
        fresh.budget, fresh.seed, fresh.rollout = (
            torch.as_tensor(x[rows], device=device) for x in (now.budget, now.seed, now.rollout)
        )
        read(self.model, fresh, batch.tokens, batch.positions, batch.valid)
        self.cache.copy_rows(torch.as_tensor(rows, device=device), fresh)

    def _run(self, name: str, call: Call, *inputs: Tensor) -> dict[str, Tensor]:
        """Make a call over tensors that stay where they are, by replay if calls are captured."""
        return call(*inputs) if self.graphs is None else self.graphs.run(name, call, *inputs)

    def _turn(self, priorities: Tensor) -> dict[str, Tensor]:
        """Evict, decode and score: all that :meth:`advance` asks of the device."""
        running = ~self.finished
        # Finished rows are trimmed too: then they have free slots for the padding that they are fed.
        evicted = self.cache.evict(
            priorities, self._everyone, self.limits.interval if self.limits.periodic else self.capacity
        )
        evicted = torch.where(running[:, None, None], evicted, -1).transpose(0, 1)
        if self.limits.periodic:
            scored = self._decode(self.cache, self.limits.interval, running)
            self.finished |= self.cache.next_position >= self.last
        else:
            scored = self._decode_rest(running)
            self.finished.fill_(True)
        return scored | {"evicted": evicted}

    def _decode(self, cache: SlotCache, columns: int, running: Tensor) -> dict[str, Tensor]:
        """Feed the next tokens of every running row, teacher-forced, and score their targets."""
        fed = cache.next_position[:, None] + torch.arange(columns, device=self.tokens.device)
        valid = (fed < self.last[:, None]) & running[:, None]
        fed = torch.where(valid, fed, 0)
        targets = fed + 1
        losses = feed(self.model, cache, self.tokens.gather(1, fed), self.tokens.gather(1, targets), fed, valid)
        answer = self.answer.gather(1, targets) & valid
        return vars(losses) | {"valid": valid, "answer": answer, "positions": targets}

    def _decode_rest(self, running: Tensor) -> dict[str, Tensor]:
        """Decode what is left of every running row into extra slots, which neither stay nor are ever evicted."""
        now = self.counters
        left = int(((now.last - now.position) * ~now.finished).max())
        extended = self._new_cache(self.rows, self.capacity + left, needs=())
        extended.copy_rows(torch.arange(self.rows, device=self.tokens.device), self.cache)
        parts = [
            self._decode(extended, min(REST_AT_ONCE, left - start), running) for start in range(0, left, REST_AT_ONCE)
        ] or [self._decode(extended, 1, running)]
        return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}

    def _window(self, scored: dict[str, Tensor]) -> WindowLosses:
        """Return the losses (N, S) of a step as a reward function gets them."""
        traces, anchors = self.counters.trace.copy(), self.counters.anchor.copy()
        targets, valid = scored["positions"], scored["valid"]
        return WindowLosses(
            **scored,
            interval=self.limits.interval,
            run_full=lambda: self._full_rows().at(traces, anchors, targets, valid),
        )

    def _full_rows(self) -> FullRows:
        """Return the full-cache losses of all rows."""
        if self._full is None:
            self._full = FullRows(self.model, self.source, rows=self.rows, columns=self.tokens.shape[1])
        return self._full

    def _future(self, kind: Kind, reduce: Reduce) -> FutureRows:
        """Return the golden utilities of all rows."""
        if (kind, reduce) not in self._futures:
            self._futures[kind, reduce] = FutureRows(
                self.model,
                self.source,
                rows=self.rows,
                latest_anchor=self.capacity,
                interval=self.limits.interval,
                trace_length=self.limits.trace_length,
                decisions=None if self.limits.periodic else 1,
                kind=kind,
                reduce=reduce,
            )
        return self._futures[kind, reduce]

    def _check_trace(self, trace: Trace, budget: int) -> None:
        """Refuse a trace that can't be decoded with this budget or by this model."""
        self.limits.check_trace(trace, budget, self.capacity)
        check_tokens(self.model, trace.tokens, f"trace {trace.name!r}", self.loaded.name)
