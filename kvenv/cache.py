"""The per-head KV cache: preallocated slots, eviction in place, positions apart from slots."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv import fused, noise
from kvenv.attention import BEYOND, HandedCache, attend_block, attention_probabilities, causal_bias
from kvenv.identity import check_policy
from kvenv.ranking import evict, eviction_order
from kvenv.rotary import Rotary
from kvenv.state import NEEDS, LayerState, Pairs, Protection
from kvenv.statistics import QueryMoments, WindowStatistics, newest
from kvenv.windows import Window, cut

if TYPE_CHECKING:
    from kvenv.golden import FutureAttention


_SLOT_AXIS = {"keys": 2, "values": 2, "positions": 3, "stats": 5, "last_attention": 4}
"""Axis of the slots in those of :meth:`SlotCache.row_tensors` that have one, by the name before the layer's number."""


class SlotCache(HandedCache):
    """A cache of C slots per (layer, KV head) whose pairs are evicted between windows.

    It serves stepping (``policy=None``: the caller evicts between calls) and layer-by-layer rollouts (a policy: the
    windows of one call are walked inside each layer's attention).

    Shapes: L layers, N rows, H KV heads, C slots, D head dimension.

    Parameters
    ----------
    model : PreTrainedModel
        Gives shapes, dtype and device.
    rows : int
        N, traces decoded side by side.
    capacity : int
        C, slots per (layer, KV head).
    interval : int
        W, tokens per window.
    budget : int or Tensor (N,) int64
        Pairs kept after an eviction.
    needs : collection of str
        Optional parts of :class:`~kvenv.state.LayerState` to keep up to date, besides those that ``policy`` needs.
    protection : Protection
        Pairs that are never evicted.
    policy : callable, optional
        Maps a LayerState to priorities (N, H, C); decides at every window from ``first_decision`` on.
    first_decision : int
        Column of a call at which the first eviction is due (rollouts only).
    last_decision : int, optional
        Column of a call after which no eviction is due any more (rollouts only).
    seed : int
        Seed of the noise.

    Attributes
    ----------
    unranked : Tensor (L, N) bool or None
        Where the policy ranked candidates by NaN, so that what it evicted means nothing; see
        :func:`kvenv.finite.check_run`. None without a policy.

    Raises
    ------
    ValueError
        If ``needs`` names something unknown, the budget doesn't hold what is protected from the policy, or the policy
        refuses the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int,
        capacity: int,
        interval: int,
        budget: int | Tensor,
        needs: Collection[str] = (),
        protection: Protection | None = None,
        policy: Callable[[LayerState], Tensor] | None = None,
        first_decision: int = 0,
        last_decision: float = math.inf,
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        check_policy(policy, model)
        self.needs: frozenset[str] = frozenset(needs) | getattr(policy, "needs", frozenset())
        unknown = self.needs - set(NEEDS)
        if unknown:
            raise ValueError(f"needs names unknown {sorted(unknown)}: known are {', '.join(NEEDS)}")
        self.interval = interval
        self.protection = protection or Protection()
        if policy is not None and isinstance(budget, int):
            self.protection.check(budget)
        self.policy = policy
        self.first_decision, self.last_decision = first_decision, last_decision
        device = model.device
        shape = (self.num_layers, rows, self.kv_heads, capacity)
        # A tensor per layer: what compiles a step would copy all layers' for a write to one's.
        self.keys, self.values = (
            [torch.zeros(*shape[1:], self.head_dim, dtype=model.dtype, device=device) for _ in range(self.num_layers)]
            for _ in range(2)
        )
        self.positions = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.next_position = torch.zeros(rows, dtype=torch.int64, device=device)
        self.prompt_length = torch.zeros_like(self.next_position)
        self.budget = torch.as_tensor(budget, dtype=torch.int64, device=device).expand(rows).clone()
        self.rollout = torch.arange(rows, device=device)
        self.seed = torch.full((rows,), seed, dtype=torch.int64, device=device)
        self.precise = torch.promote_types(model.dtype, torch.float32)
        self._number_slots(capacity)
        self._windows: list[Window] = []
        self.statistics = (
            WindowStatistics(shape, self.groups, self.precise, device)
            if {"stats", "last_attention"} & self.needs
            else None
        )
        self.rotary = Rotary.of(model)
        self.moments = (
            QueryMoments(
                (self.num_layers, rows, self.kv_heads, self.groups), self.head_dim, self.rotary, self.precise, device
            )
            if "query_moments" in self.needs
            else None
        )
        if "queries" in self.needs:
            window = (rows, self.kv_heads, self.groups, interval, self.head_dim)
            self.queries = [torch.zeros(window, dtype=model.dtype, device=device) for _ in range(self.num_layers)]
            self.query_valid = torch.zeros(self.num_layers, rows, interval, dtype=torch.bool, device=device)
        self.future: FutureAttention | None = None
        self.expected_future: FutureAttention | None = None
        self.on_eviction: Callable[[LayerState, Tensor, Tensor], None] | None = None
        self.unranked = None if policy is None else torch.zeros(shape[:2], dtype=torch.bool, device=device)
        self._encode: Callable[[Pairs], Tensor] | None = getattr(policy, "encode", None)
        self._encoded: list[Tensor | None] = [None] * self.num_layers

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, padding: Tensor | None
    ) -> Tensor:
        """Walk the windows of this call: evict where due, cache the window's pairs, attend."""
        if query.shape[0] != self.positions.shape[1]:
            raise ValueError(f"the cache has {self.positions.shape[1]} rows, not the batch's {query.shape[0]}")
        if self._fed is None:
            raise ValueError(
                "a SlotCache is told what is fed (kvenv.decode.feed); to generate, take a kvenv.EvictingCache"
            )
        positions, valid = self._fed
        if layer == 0:
            self._windows = self._cut(positions, valid)
        encoded = self.encode(layer, key, value, positions)
        query = query.unflatten(1, (self.kv_heads, self.groups))
        outputs = []
        for window in self._windows:
            if self.policy is not None and self.first_decision <= window.start <= self.last_decision:
                self.decide(layer, window.next_position, window.active)
            columns = slice(window.start, window.stop)
            self.insert(layer, window, [x[:, :, columns] for x in (key, value, encoded) if x is not None])
            outputs.append(self._attend(layer, query[:, :, :, columns], window, scaling))
        if layer == self.num_layers - 1:
            fed = torch.where(valid, positions, -1).amax(dim=1) + 1
            self.next_position.copy_(torch.maximum(self.next_position, fed))
            self._fed, self._windows = None, []
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3)
        return output.flatten(1, 2)

    def layer_state(
        self,
        layer: int,
        next_position: Tensor | None = None,
        needs: Collection[str] | None = None,
        mask: Tensor | None = None,
    ) -> LayerState:
        """Return what a policy sees of a layer now.

        Parameters
        ----------
        layer : int
            Index of the layer.
        next_position : Tensor (N,) int64, optional
            Position of the token fed next, where a walk inside a call is ahead of the cache's own count.
        needs : collection of str, optional
            Optional parts to fill in, of those that are kept up to date; all of them if not given.
        mask : Tensor (N, H, C) bool, optional
            The layer's candidates, if they are known already.
        """
        wanted = self.needs if needs is None else needs
        upcoming = self.next_position if next_position is None else next_position
        positions = self.positions[layer]
        if mask is None:
            mask = self.protection.candidates(positions, upcoming, self.prompt_length)
        moments = self.moments if "query_moments" in wanted else None
        state = LayerState(
            layer=layer,
            keys=self.keys[layer],
            values=self.values[layer],
            positions=positions,
            groups=self.groups,
            mask=mask,
            filled=positions >= 0,
            next_position=upcoming,
            prompt_length=self.prompt_length,
            budget=self.budget,
            interval=self.interval,
            stats=self.statistics.of(layer) if self.statistics and "stats" in wanted else None,
            last_attention=self.statistics.last[layer] if self.statistics and "last_attention" in wanted else None,
            queries=self.queries[layer] if "queries" in wanted else None,
            query_valid=self.query_valid[layer] if "queries" in wanted else None,
            query_mean=moments.mean(layer) if moments else None,
            query_cov=moments.covariance(layer) if moments else None,
            rotary=self.rotary,
            future=self.future.at(layer, positions, upcoming) if self.future else None,
            expected_future=self.expected_future.at(layer, positions, upcoming) if self.expected_future else None,
            noise=self._noise(layer, positions, upcoming) if "noise" in wanted else None,
            encoded=self._encoded[layer],
        )
        return state

    def encode(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> Tensor | None:
        """Return what the policy says of all pairs of a call (N, H, S, K), and make room for it in the slots.

        Parameters
        ----------
        layer : int
            Index of the layer.
        key, value : Tensor (N, H, S, D)
            New pairs.
        positions : Tensor (N, S) int64
            Where they are.

        Returns
        -------
        Tensor (N, H, S, K) or None
            None if the policy encodes nothing.
        """
        if self._encode is None:
            return None
        places = positions[:, None].expand(key.shape[:3])
        encoded = self._encode(
            Pairs(layer=layer, keys=key, values=value, positions=places, groups=self.groups, rotary=self.rotary)
        )
        if self._encoded[layer] is None:
            self._encoded[layer] = encoded.new_zeros(*self.positions.shape[1:], encoded.shape[-1])
        return encoded

    def decide(self, layer: int, next_position: Tensor, active: Tensor) -> None:
        """Let the policy rank one layer's candidates and evict active rows (N,) down to their budgets."""
        if self.policy is None:
            return
        state = self.layer_state(layer, next_position)
        priorities = self.policy(state)
        if self.unranked is not None:
            self.unranked[layer] |= (priorities.isnan() & state.mask).flatten(1).any(dim=1) & active
        order = eviction_order(priorities, state.positions, state.mask)
        count = self._excess(state.positions, active)
        if self.on_eviction is not None:
            self.on_eviction(state, order, count)
        evict(self.positions[layer], order, count, self.capacity)

    def insert(self, layer: int, window: Window, new: list[Tensor]) -> None:
        """Write a window's keys, values and what else there is of its pairs (N, H, S, ...) to free slots of each head.

        Padding lands in free slots that stay empty.
        """
        held = self.positions[layer]
        # A window wider than the cache is one that fills it: its first columns are padding of every row.
        positions, *new = (x[:, :, -self.capacity :] for x in (window.held, *new))
        # The slots that hold the least, of which empty ones are told apart, so that the choice is always the same.
        slots = torch.where(held < 0, self._empty, held).topk(positions.shape[2], largest=False).indices
        where = (slots + self._first).view(-1)
        for kept, x in zip((self.keys[layer], self.values[layer], self._encoded[layer]), new):
            if kept is not None:
                write(kept, where, x)
        held.scatter_(2, slots, positions.expand(slots.shape))
        if self.statistics is not None:
            self.statistics.forget(layer, slots)

    def settle(self, layer: int, slots: Tensor, positions: Tensor) -> None:
        """Take in what is kept of pairs at ``positions`` (N, S) that were written to ``slots`` (N, H, S)."""
        if self._encode is not None:
            where = (slots + self._first).view(-1)
            key, value = (
                x[layer].view(-1, self.head_dim)[where].view(*slots.shape, -1) for x in (self.keys, self.values)
            )
            new = self.encode(layer, key, value, positions)
            if new is not None and (kept := self._encoded[layer]) is not None:
                write(kept, where, new)
        if self.statistics is not None:
            self.statistics.forget(layer, slots)

    def held(self, layer: int) -> Tensor:
        """Return the position of what each slot of a layer holds (N, H, 1, C), :data:`BEYOND` where it is empty."""
        held = self.positions[layer]
        return torch.where(held < 0, BEYOND, held.to(self.precise))[:, :, None]

    def bias(self, layer: int, reach: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the additive mask (N, H, S, C) of queries at positions ``reach`` (N, 1, S, 1) over a layer's slots."""
        return causal_bias(reach, self.held(layer), dtype)

    def candidates(self) -> Tensor:
        """Return the mask (L, N, H, C) of evictable slots."""
        return self.protection.candidates(self.positions, self.next_position, self.prompt_length)

    def evict(self, priorities: Tensor, active: Tensor, at_most: int) -> Tensor:
        """Evict every (layer, head) of every active row down to its budget.

        Parameters
        ----------
        priorities : Tensor (L, N, H, C)
            Higher means keep.
        active : Tensor (N,) bool
            Rows that evict at all.
        at_most : int
            Upper bound of the pairs any head evicts: E.

        Returns
        -------
        Tensor (L, N, H, E) int64
            Evicted positions in order, -1 beyond each head's count.
        """
        order = eviction_order(priorities, self.positions, self.candidates(), at_most)
        return evict(self.positions, order, self._excess(self.positions, active), at_most)

    def row_tensors(self) -> dict[str, tuple[Tensor, int]]:
        """Return every tensor of run state by name, with the axis that is the row."""
        tensors = {
            **_by_layer("keys", self.keys),
            **_by_layer("values", self.values),
            "positions": (self.positions, 1),
            "next_position": (self.next_position, 0),
            "prompt_length": (self.prompt_length, 0),
            "budget": (self.budget, 0),
            "rollout": (self.rollout, 0),
            "seed": (self.seed, 0),
        }
        if self.statistics:
            tensors |= {"stats": (self.statistics.values, 1), "last_attention": (self.statistics.last, 1)}
        if self.moments:
            tensors |= self.moments.row_tensors()
        if "queries" in self.needs:
            tensors |= _by_layer("queries", self.queries) | {"query_valid": (self.query_valid, 1)}
        return tensors

    def resize(self, capacity: int) -> None:
        """Take another number of slots, enough for what is cached; what a slot holds moves with it."""
        kept = (self.positions < 0).to(torch.int8).argsort(dim=-1, stable=True)[..., :capacity]

        def moved(x: Tensor, kept: Tensor, axis: int, empty: float = 0) -> Tensor:
            apart = [1] * (axis + 1 - kept.dim()), [1] * (x.dim() - axis - 1)
            shape, where = list(x.shape), kept.view(*kept.shape[:-1], *apart[0], -1, *apart[1])
            shape[axis] = kept.shape[-1]
            held = x.gather(axis, where.expand(shape))
            shape[axis] = capacity - kept.shape[-1]
            return torch.cat([held, held.new_full(shape, empty)], dim=axis)

        self.keys, self.values = ([moved(x, own, 2) for x, own in zip(all_, kept)] for all_ in (self.keys, self.values))
        if self.statistics is not None:
            self.statistics.values = moved(self.statistics.values, kept, 5)
            self.statistics.last = moved(self.statistics.last, kept, 4)
        self._encoded = [None if x is None else moved(x, own, 2) for x, own in zip(self._encoded, kept)]
        self.positions = moved(self.positions, kept, 3, -1)
        self._number_slots(capacity)

    def copy_rows(self, rows: Tensor, source: SlotCache) -> None:
        """Overwrite rows by those of another cache, which may have fewer slots: row ``rows[i]`` becomes its row i."""
        self.positions.index_fill_(1, rows, -1)
        given = source.row_tensors()
        for name, (target, axis) in self.row_tensors().items():
            if (slots := _SLOT_AXIS.get(name.split(".")[0])) is not None:
                target = target.narrow(slots, 0, source.capacity)
            target.index_copy_(axis, rows, given[name][0])

    def _number_slots(self, capacity: int) -> None:
        """Number a layer's slots: `_first` (N, H, 1) is each head's first, and `_empty` (C,) tells empty ones apart."""
        self.capacity, device = capacity, self.positions.device
        heads = self.positions.shape[1:3]
        self._first = torch.arange(0, heads.numel() * capacity, capacity, device=device).view(*heads, 1)
        self._empty = torch.arange(-capacity, 0, device=device)

    def _cut(self, positions: Tensor, valid: Tensor) -> list[Window]:
        """Cut the columns of a call into windows; what precedes the first decision is one if nobody looks."""
        columns = positions.shape[1]
        cuts = [0, columns]
        if columns > self.interval and (self.statistics is not None or self.policy is not None):
            prefix = 0 if self.statistics is not None else self.first_decision
            cuts = sorted({0, *range(max(prefix, 0), columns, self.interval), columns})
        return cut(positions, valid, cuts, self.precise)

    def _excess(self, positions: Tensor, active: Tensor) -> Tensor:
        """Pairs beyond the budget per head of active rows: (..., N, H)."""
        excess = (positions >= 0).sum(dim=-1) - self.budget[:, None]
        return excess.clamp(min=0) * active[:, None]

    def _attend(self, layer: int, query: Tensor, window: Window, scaling: float) -> Tensor:
        """Attend over the slots and take from the queries what the policy needs."""
        if self.moments is not None:
            self.moments.add(layer, query, window.positions, window.valid)
        if "queries" in self.needs:
            self.queries[layer].copy_(newest(query, self.interval, dim=3))
            self.query_valid[layer].copy_(newest(window.valid, self.interval, dim=1))
        if self.statistics is None:
            bias = self.bias(layer, window.reach, query.dtype)
            return attend_block(query, self.keys[layer], self.values[layer], bias, scaling)
        return self.attend_and_count(self.statistics, layer, query, window, scaling)

    def attend_and_count(
        self, statistics: WindowStatistics, layer: int, query: Tensor, window: Window, scaling: float
    ) -> Tensor:
        """Attend over a layer's slots, and add what they receive to the statistics."""
        keys, values = self.keys[layer], self.values[layer]
        if fused.serves(query):
            case = (query, keys, values, window.reach, self.held(layer), window.spans[:, 0, 0])
            attended = fused.attend(*case, scaling, extremes=True)
            largest, smallest = attended.extremes.unbind(dim=3)
            statistics.add_reduced(layer, attended.sums, largest, smallest, window)
            return attended.output
        probabilities = attention_probabilities(query, keys, self.bias(layer, window.reach, self.precise), scaling)
        statistics.add(layer, probabilities, window)
        mixed = probabilities.flatten(2, 3).to(values.dtype) @ values
        return mixed.view(query.shape)

    def _noise(self, layer: int, positions: Tensor, next_position: Tensor) -> Tensor:
        """Uniform noise (N, H, C) of the decision before ``next_position``."""
        window = torch.div(next_position - self.budget, self.interval, rounding_mode="floor")
        heads = torch.arange(self.kv_heads, device=positions.device)[None, :, None]
        seed, rollout, window = (x[:, None, None] for x in (self.seed, self.rollout, window))
        return noise.uniform(seed, rollout, layer, heads, window, positions)


def write(kept: Tensor, where: Tensor, new: Tensor) -> None:
    """Write vectors (..., D) to the places ``where`` (M,) of those of ``kept`` (..., D), counted through."""
    kept.view(-1, kept.shape[-1]).index_copy_(0, where, new.reshape(-1, kept.shape[-1]))


def _by_layer(name: str, tensors: list[Tensor]) -> dict[str, tuple[Tensor, int]]:
    """Return the layers' tensors, whose first axis is the row, by names of their own."""
    return {f"{name}.{layer}": (x, 0) for layer, x in enumerate(tensors)}
