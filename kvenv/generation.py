"""Generate text under a budget: a cache for Hugging Face's own ``generate`` that evicts as the environment does."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.attention import READY, HandedCache, attend_block, restore, use_kvenv_attention
from kvenv.cache import SlotCache
from kvenv.identity import check_policy
from kvenv.state import LayerState, Protection, check_integer
from kvenv.token_step import TokenStep
from kvenv.traces import SCHEDULES
from kvenv.windows import Window, cut

__all__ = ["EvictingCache", "restore"]

LOOKED_AT = frozenset({"stats", "last_attention", "queries", "query_moments"})
"""Needs that take the queries of the last window."""

SPARE = 256
"""Slots that a cache is made larger by where its final size isn't known or far away."""

_log = logging.getLogger("kvenv")


@dataclass(frozen=True)
class Block:
    """Columns of a call between two boundaries.

    Attributes
    ----------
    columns : Window
        The columns.
    at : Tensor (N,) int64
        Position of each row's next token before them.
    evicting : Tensor (N,) bool or None
        Rows that evict before them; None if none does.
    ended : Window or None
        The last W tokens of each row, valid in rows whose window ends before the columns; None if nobody looks.
    place : Tensor (N, S) int64
        Place of each of the newest S <= W queries in its row's window.
    """

    columns: Window
    at: Tensor
    evicting: Tensor | None
    ended: Window | None
    place: Tensor


class EvictingCache(HandedCache):
    """A key-value cache of bounded size for ``model.generate(..., past_key_values=...)``.

    Since transformers 5.24 the argument's name is ``cache``, with a warning for the old one.

    Every row of the batch fills up to ``budget + interval`` pairs per (layer, KV head), then the policy ranks them and
    the cache evicts down to the budget, again and again: what ``KVEvict-v0`` and :func:`kvenv.rollout` do with the
    same text. A prompt longer than that is walked window by window. Left padding takes no slot. Greedy decoding,
    sampling, EOS and streamers work as ever; beams and assisted decoding are refused.

    The model is switched to kvenv's attention, which behaves as SDPA for any other cache; :func:`kvenv.restore`
    switches it back.

    Parameters
    ----------
    model : PreTrainedModel
        Any decoder-only model that goes through transformers' attention interface.
    policy : callable
        Maps a :class:`kvenv.LayerState` to keep-priorities (N, H, C): anything that ``agents.make`` makes but golden.
    budget : int
        B, pairs that each (layer, KV head) keeps.
    interval : int
        W, tokens between two evictions.
    schedule : {"periodic", "prefill"}
        With ``prefill`` the prompt attends fully, is evicted from once, and what is generated stays.
    protection : Protection, optional
        Pairs never evicted; if not given, the first 4 and the newest W.
    seed : int
        Of the noise that random policies draw from.
    rollouts : sequence of int, optional
        Rollout number of each row, for the noise; 0, 1, ... if not given.
    compileable : bool
        Whether ``generate`` may compile the decoding of single tokens: on accelerators it then does so by itself, as
        with static caches, elsewhere if its ``compile_config`` says so. The first tokens wait for it.

    Raises
    ------
    ValueError
        If the policy needs the future or was trained for another architecture, a number is impossible, or the budget
        doesn't hold what is protected.

    Examples
    --------
    >>> cache = kvenv.EvictingCache(model, agents.make("h2o"), budget=1024, interval=128)  # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Callable[[LayerState], Tensor],
        *,
        budget: int,
        interval: int = 128,
        schedule: str = "periodic",
        protection: Protection | None = None,
        seed: int = 0,
        rollouts: Sequence[int] | None = None,
        compileable: bool = False,
    ) -> None:
        needs: frozenset[str] = getattr(policy, "needs", frozenset())
        if future := needs & {"future", "expected_future"}:
            raise ValueError(
                f"policy {getattr(policy, 'name', policy)!r} needs {', '.join(sorted(future))}, and what is yet to be "
                "generated has no known future: choose a causal policy"
            )
        check_policy(policy, model)
        check_integer("budget", budget, 1)
        check_integer("interval", interval, 1)
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}: known are {', '.join(SCHEDULES)}")
        self.protection = protection or Protection(recent=interval)
        self.protection.check(budget)
        if use_kvenv_attention(model):
            _log.warning("%s was switched to kvenv's attention; kvenv.restore(model) undoes it", type(model).__name__)
        super().__init__(model)
        self.model, self.policy, self.budget, self.interval, self.seed = model, policy, budget, interval, seed
        self.periodic, self.looked_at = schedule == "periodic", bool(needs & LOOKED_AT)
        self._needs = needs | {"queries"} if self.looked_at else needs
        self._compileable, self._rollouts = compileable, rollouts
        self.seen, self._scaling = 0, 1.0
        self._slots: SlotCache | None = None
        self._step: TokenStep | None = None
        # Tokens that can be fed one by one before anything else happens, and whether that was done for the next one.
        self._left, self._ready = 0, False
        # Of each row, on the host: tokens so far, and the position of the first decision.
        self._next = self._anchor = np.zeros(0, np.int64)
        self._positions = torch.zeros(0, 0, dtype=torch.int64)
        self._blocks: list[Block] = []

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the decoding of single tokens."""
        return self._compileable

    @property
    def nbytes(self) -> int:
        """Bytes of the cached keys and values."""
        return 0 if self._slots is None else sum(x.nbytes for x in (*self._slots.keys, *self._slots.values))

    @property
    def unranked(self) -> Tensor | None:
        """Where (L, N) the policy ranked pairs by NaN (:func:`kvenv.finite.check_run`); None before the first token."""
        return None if self._slots is None else self._slots.unranked

    @property
    def positions(self) -> Tensor:
        """Absolute positions (L, N, H, C) of the cached pairs, -1 where a slot is empty."""
        if self._slots is None:
            raise ValueError("nothing is cached yet")
        self._settle()
        return self._slots.positions

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen, not stored: generate slices its inputs and makes positions from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Get ready for a single token of every row; models ask before they attend, outside of what is compiled."""
        if query_length != 1 or self._slots is None:
            return super().get_mask_sizes(query_length, layer_idx)
        if not self._ready:
            self._next_token(self._slots)
        return READY

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, padding: Tensor | None
    ) -> Tensor:
        """Attend to a single token's slots, or walk the blocks of this call."""
        if self._step is not None and padding is not None and padding.dim() == 4:
            if layer == self.num_layers - 1:
                self._ready = False
            return self._step.attend(layer, query, key, value, scaling)
        if layer == 0 or self._slots is None:
            self._slots = self._begin(query.shape[0], query.shape[2], padding)
        return self._walk(self._slots, layer, query, key, value, scaling)

    def _walk(self, slots: SlotCache, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Walk the blocks of a call: evict where due, cache the block's pairs, attend."""
        self._scaling = scaling
        query = query.unflatten(1, (self.kv_heads, self.groups))
        encoded = slots.encode(layer, key, value, self._positions)
        outputs = []
        for block in self._blocks:
            columns = slice(block.columns.start, block.columns.stop)
            self._turn(slots, layer, block, scaling)
            slots.insert(layer, block.columns, [x[:, :, columns] for x in (key, value, encoded) if x is not None])
            asked = query[:, :, :, columns]
            if self.looked_at:
                self._remember(slots, layer, asked, block.place)
            bias = slots.bias(layer, block.columns.reach, query.dtype)
            outputs.append(attend_block(asked, slots.keys[layer], slots.values[layer], bias, scaling))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3)
        return output.flatten(1, 2)

    def _begin(self, rows: int, columns: int, padding: Tensor | None) -> SlotCache:
        """Lay a call out in blocks, and return slots that have room for it."""
        pads = self._pads(rows, columns, padding)
        slots = self._slots
        if slots is None:
            self._next = np.zeros(rows, np.int64)
            self._anchor = np.full(rows, self.budget + self.interval) if self.periodic else columns - pads
        elif rows != len(self._next):
            raise ValueError(f"the cache has {len(self._next)} rows, not the batch's {rows}: make a new one")
        size = self._size(0 if slots is None else slots.capacity, self._most(columns - pads))
        if slots is None:
            slots = SlotCache(
                self.model,
                rows=rows,
                capacity=size,
                interval=self.interval,
                budget=self.budget,
                needs=self._needs,
                protection=self.protection,
                policy=self.policy,
                seed=self.seed,
            )
            slots.prompt_length.copy_(torch.as_tensor(columns - pads))
            if self._rollouts is not None:
                slots.rollout.copy_(torch.as_tensor(self._rollouts))
        self._settle()
        if size != slots.capacity:
            slots.resize(size)
        self._lay_out(slots, columns, pads)
        self._next, self.seen = self._next + columns - pads, self.seen + columns
        slots.next_position += torch.as_tensor(columns - pads, device=slots.next_position.device)
        return slots

    def _pads(self, rows: int, columns: int, padding: Tensor | None) -> np.ndarray:
        """Return how many columns of this call are padding (N,)."""
        # A single token is never padding: looking would make the host wait for every one.
        if padding is None or columns == 1:
            return np.zeros(rows, np.int64)
        valid = padding[:, -columns:].bool().cpu().numpy()
        pads = columns - valid.sum(axis=1)
        if (valid != (np.arange(columns) >= pads[:, None])).any():
            raise ValueError("padding must be on the left: set tokenizer.padding_side = 'left'")
        if pads.any() and self._slots is not None:
            raise ValueError("padding comes after cached tokens: only the first call's prompts can be padded")
        return pads

    def _next_token(self, slots: SlotCache) -> None:
        """Get ready for one more token of every row."""
        if not self._left:
            self._pause(slots)
        if self._step is not None:
            self._step.advance()
        self._next, self.seen, self._left, self._ready = self._next + 1, self.seen + 1, self._left - 1, True

    def _pause(self, slots: SlotCache) -> None:
        """Between two single tokens: end windows, evict, make room, and say for how many tokens that will do."""
        self._settle()
        self._lay_out(slots, 1, np.zeros_like(self._next))
        for layer in range(self.num_layers):
            self._turn(slots, layer, self._blocks[0], self._scaling)
        most = self._most(np.ones_like(self._next), turned=True)
        size = self._size(slots.capacity, most)
        if size != slots.capacity:
            slots.resize(size)
        if self._step is None or self._step.capacity != size:
            self._step = TokenStep(slots, self.looked_at, self.is_compileable)
        # A periodic cache of full size is never short of room: an eviction comes first.
        room = sys.maxsize if self.periodic and size == self.budget + self.interval else size - most + 1
        self._left = min(room, self._until_turn())
        self._step.refresh(torch.as_tensor(self._anchor, device=slots.positions.device), self._left)

    def _settle(self) -> None:
        """Let the slots take in the single tokens that went to them; before the next one, :meth:`_pause` is due."""
        if self._step is not None:
            self._step.settle()
        self._left = 0

    def _until_turn(self) -> int:
        """Return how many tokens can be fed before a window of any row ends that has to be acted upon."""
        if not self.periodic:
            return sys.maxsize
        left = self._anchor - self._next
        left = left % self.interval if self.looked_at else np.where(left > 0, left, left % self.interval)
        return int(np.where(left == 0, self.interval, left).min())

    def _most(self, new: np.ndarray, turned: bool = False) -> int:
        """Return the most pairs that a row holds when ``new`` (N,) more tokens have been fed.

        With ``turned``, what falls due before them was evicted.
        """
        after = self._next + new
        if self.periodic:
            return int(min(after.max(), self.budget + self.interval))
        # The eviction falls due with the first token behind the prompt.
        evicted = np.where(self._next + turned > self._anchor, np.maximum(self._anchor - self.budget, 0), 0)
        return int((after - evicted).max())

    def _size(self, slots: int, most: int) -> int:
        """Return how many slots to have for so many pairs, where there are ``slots`` now."""
        limit = self.budget + self.interval if self.periodic else sys.maxsize
        if most > slots:
            wanted = max(most + SPARE, 2 * slots)
            return limit if limit <= wanted + SPARE else wanted
        return slots if self.periodic or slots <= 2 * (most + SPARE) else most + SPARE

    def _lay_out(self, slots: SlotCache, columns: int, pads: np.ndarray) -> None:
        """Cut the columns of a call wherever a row's window ends."""
        device = slots.positions.device
        column = np.arange(columns)[:, None]
        position = self._next + column - pads
        ends = (position >= self._next) & (position > 0) & ((position - self._anchor) % self.interval == 0)
        evicts = ends & (position >= self._anchor if self.periodic else position == self._anchor)
        if not self.looked_at:
            ends = evicts
        elif not self.periodic:  # nobody is asked any more after the one eviction
            ends &= position <= self._anchor
        cuts = sorted({0, columns, *np.flatnonzero(ends.any(axis=1)).tolist()})
        start = slots.next_position[:, None] - torch.as_tensor(pads, device=device)[:, None]
        positions = start + torch.arange(columns, device=device)
        self._positions = positions
        windows = cut(positions, positions >= slots.next_position[:, None], cuts, slots.precise)
        self._blocks = [self._block(slots, window, ends[window.start], evicts[window.start]) for window in windows]

    def _block(self, slots: SlotCache, window: Window, ends: np.ndarray, evicts: np.ndarray) -> Block:
        """Return a block: which rows' windows end before it, and which of them evict."""
        device = slots.positions.device
        at = torch.maximum(window.next_position, slots.next_position)
        ended = None
        if self.looked_at and ends.any():
            positions = at[:, None] + torch.arange(-self.interval, 0, device=device)
            valid = (positions >= 0) & torch.as_tensor(ends, device=device)[:, None]
            ended = Window(0, self.interval, positions, valid, slots.precise)
        # A block has at most one window's tokens of each row, the newest; before them may be any amount of padding.
        newest = window.positions[:, -self.interval :]
        place = (newest - torch.as_tensor(self._anchor, device=device)[:, None]) % self.interval
        return Block(window, at, torch.as_tensor(evicts, device=device) if evicts.any() else None, ended, place)

    def _turn(self, slots: SlotCache, layer: int, block: Block, scaling: float) -> None:
        """Act upon the windows of a layer that end before a block: look at their attention, evict."""
        if block.ended is not None:
            self._look(slots, layer, block.ended, scaling)
        if block.evicting is not None:
            slots.decide(layer, block.at, block.evicting)

    def _remember(self, slots: SlotCache, layer: int, query: Tensor, place: Tensor) -> None:
        """Keep the newest of queries (N, H, G, S, D) at their place in their row's window."""
        rows, newest = torch.arange(len(place), device=place.device)[:, None], query[:, :, :, -self.interval :]
        slots.queries[layer].permute(0, 3, 1, 2, 4).index_put_((rows, place), newest.permute(0, 3, 1, 2, 4))

    def _look(self, slots: SlotCache, layer: int, ended: Window, scaling: float) -> None:
        """Take from the queries of windows that ended what the policy needs."""
        queries = slots.queries[layer]
        slots.query_valid[layer].copy_(ended.valid)
        if slots.moments is not None:
            slots.moments.add(layer, queries, ended.positions, ended.valid)
        if slots.statistics is not None:
            slots.attend_and_count(slots.statistics, layer, queries, ended, scaling)
