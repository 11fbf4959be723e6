"""Greedy decoding whose forward of a token is captured in a CUDA graph, over three caches: ours, static, and full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from kvenv.attention import CACHE, HandedCache
from kvenv.cache import SlotCache
from kvenv.generation import Block, EvictingCache
from kvenv.graphs import Graphs
from kvenv.state import LayerState
from kvenv.token_step import TokenStep
from kvenv.windows import Window


class Tokens:
    """Greedy decoding over a cache, one captured forward a token.

    Parameters
    ----------
    model : PreTrainedModel
        On kvenv's attention, which is SDPA for caches that aren't ours.
    cache : Cache
        Its tensors stay where they are, and what a forward writes of one position it may write again.
    mask : callable
        Maps the token's position (N, 1) to the model's attention mask.
    first : Tensor (N, 1) int64
        The token fed first.
    position : int
        Where that is.
    state : sequence of Tensor
        What a forward changes for good.

    Attributes
    ----------
    graphs : Graphs
        The captured forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        mask: Callable[[Tensor], Any],
        first: Tensor,
        position: int,
        state: Sequence[Tensor] = (),
    ) -> None:
        self._model, self._cache, self._mask = model, cache, mask
        self.graphs = Graphs(first.device, state)
        self._token, self._position = first, torch.full_like(first, position)

    def next(self) -> Tensor:
        """Feed the last token (N, 1) and return the most likely next."""
        told = self.graphs.run("token", self._forward, self._token, self._position)
        self._token, self._position = told["token"], told["position"]
        return self._token

    def go_back(self, position: int) -> None:
        """Feed the last token at this position."""
        self._position.fill_(position)

    def _forward(self, token: Tensor, position: Tensor) -> dict[str, Tensor]:
        logits = self._model(
            input_ids=token,
            position_ids=position,
            attention_mask=self._mask(position),
            use_cache=True,
            **{CACHE: self._cache},
        ).logits
        return {"token": logits.argmax(dim=-1), "position": position + 1}


class ToldCache(EvictingCache):
    """An :class:`EvictingCache` that is told of every single token, since a replayed model asks for nothing.

    Attributes
    ----------
    captured : bool
        Whether evictions are captured as well, once every window is a full one of all rows.
    graphs : Graphs or None
        The captured eviction, once there is one.
    """

    captured = False
    graphs: Graphs | None = None

    @torch.no_grad()
    def next_token(self) -> None:
        """Get ready for one more token of every row: evict if that is due, take the next free slots."""
        if self._slots is not None:
            self._next_token(self._slots)

    def _pause(self, slots: SlotCache) -> None:
        past, step = self._next - self._anchor, self._step
        ends = (past >= 0) & (past % self.interval == 0)
        if not self.captured or step is None or step.taken != self.interval or not ends.all():
            super()._pause(slots)
            return
        if self.graphs is None:
            self.graphs = Graphs(self.model.device, [*_changing(slots), *step.state()])
        anchor = torch.as_tensor(self._anchor, device=self.model.device)
        self.graphs.run("eviction", partial(self._turn_all, slots, step), anchor)
        step.taken, self._left = 0, self.interval

    def _turn_all(self, slots: SlotCache, step: TokenStep, anchor: Tensor) -> dict[str, Tensor]:
        """Take in a window of all rows, look at its attention, evict, and find the free slots: device alone."""
        step.taken = self.interval
        step.settle()
        at = slots.next_position.clone()
        positions = at[:, None] + torch.arange(-self.interval, 0, device=at.device)
        valid = torch.ones_like(positions, dtype=torch.bool)
        window = Window(0, self.interval, positions, valid, slots.precise)
        block = Block(window, at, valid[:, 0], window if self.looked_at else None, positions)
        for layer in range(self.num_layers):
            self._turn(slots, layer, block, self._scaling)
        step.refresh(anchor, self.interval)
        return {}

    @torch.no_grad()
    def fill(self, rows: int) -> None:
        """Take random pairs as if B + W tokens of every row had been fed, so that an eviction comes next."""
        tokens = self.budget + self.interval
        slots = self._slots = self._begin(rows, tokens, None)
        self._scaling = self.head_dim**-0.5
        for x in (slots.keys, slots.values, slots.queries) if self.looked_at else (slots.keys, slots.values):
            for of_layer in x:
                of_layer.normal_()
        positions = torch.arange(tokens, device=slots.positions.device)
        slots.positions.copy_(positions.expand(slots.positions.shape))
        for layer, where in enumerate(slots.positions):
            slots.settle(layer, where, positions.expand(rows, -1))


KEPT = ("keys", "values", "queries")
"""What an eviction leaves as it is."""


def _changing(slots: SlotCache) -> list[Tensor]:
    """Return the tensors of slots that an eviction may write to."""
    rows = {name: x for name, (x, _) in slots.row_tensors().items() if name.split(".")[0] not in KEPT}
    encoded = [slots.layer_state(layer, needs=()).encoded for layer in range(slots.num_layers)]
    return [*rows.values(), *(x for x in encoded if x is not None)]


class EvictingTokens:
    """Decoding under a budget over random pairs, window by window: call :meth:`evict` and :meth:`decode` in turn.

    Parameters
    ----------
    model : PreTrainedModel
        On kvenv's attention.
    policy : callable
        Ranks the pairs.
    rows, budget, interval : int
        N, B and W.
    captured : bool
        Whether evictions are captured too, which keeps the memory that one takes.

    Attributes
    ----------
    cache : ToldCache
        What is decoded over.
    graphs : Graphs
        The captured forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Callable[[LayerState], Tensor],
        *,
        rows: int,
        budget: int,
        interval: int,
        captured: bool = False,
    ) -> None:
        self.cache = ToldCache(model, policy, budget=budget, interval=interval, compileable=False)
        self.cache.captured = captured
        self.cache.fill(rows)
        self._tokens = told_tokens(self.cache, torch.zeros(rows, 1, dtype=torch.int64, device=model.device))
        self.graphs = self._tokens.graphs

    def evict(self) -> None:
        """Look at the last window's attention, rank, evict, and get ready for a token."""
        self.cache.next_token()

    def decode(self) -> None:
        """Decode a window, for whose first token the cache is ready."""
        for number in range(self.cache.interval):
            if number:
                self.cache.next_token()
            self._tokens.next()


def told_tokens(cache: ToldCache, first: Tensor) -> Tokens:
    """Return decoding over a cache that holds something: before each token call its ``next_token``."""

    def ready(position: Tensor) -> Tensor:
        # Models leave a mask of 4 dimensions alone, and the cache has one of its own.
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=position.device)

    return Tokens(cache.model, cache, ready, first, cache.get_seq_length())


class StaticTokens:
    """Decoding over transformers' ``StaticCache``, of which the first ``filled`` slots count as fed.

    Parameters
    ----------
    model : PreTrainedModel
        On kvenv's attention, which is SDPA for this cache.
    filled, slots : int
        Pairs before the first token, and the cache's length.

    Attributes
    ----------
    graphs : Graphs
        The captured forward.
    """

    def __init__(self, model: PreTrainedModel, filled: int, slots: int) -> None:
        shape, device = HandedCache(model), model.device
        cache = StaticCache(config=model.config, max_cache_len=slots)
        cache.early_initialization(1, shape.kv_heads, shape.head_dim, model.dtype, device)
        self._filled = filled
        self._counts = [layer.cumulative_length for layer in cache.layers if isinstance(layer, StaticLayer)]
        number = torch.arange(slots, device=device)

        def seen(position: Tensor) -> Tensor:
            return (number <= position)[:, None, None]

        first = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._tokens = Tokens(model, cache, seen, first, filled, self._counts)
        self.graphs = self._tokens.graphs

    def decode(self, count: int) -> Tensor:
        """Decode so many tokens after the filled slots, again, and return the last (1, 1)."""
        for x in self._counts:
            x.fill_(self._filled)
        self._tokens.go_back(self._filled)
        return [self._tokens.next() for _ in range(count)][-1]


class FullCache(Cache):
    """A view of the first pairs of every layer, whose last is the token's own: a full cache at one length.

    Parameters
    ----------
    pairs : sequence of Tensor (2, N, H, T, D)
        Keys and values of each layer.
    length : int
        Pairs that are seen, the token's own included.
    """

    def __init__(self, pairs: Sequence[Tensor], length: int) -> None:
        super().__init__(layers=[])
        self._pairs = [x[:, :, :, :length].unbind() for x in pairs]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the token's pair behind the others and return all."""
        keys, values = self._pairs[layer_idx]
        keys[:, :, -1:].copy_(key_states)
        values[:, :, -1:].copy_(value_states)
        return keys, values


def full_tokens(model: PreTrainedModel, pairs: Sequence[Tensor], length: int) -> Tokens:
    """Return decoding of the token that is number ``length``, over and over."""
    first = torch.zeros(pairs[0].shape[1], 1, dtype=torch.int64, device=pairs[0].device)
    # All pairs are seen, and without a mask SDPA takes its fastest kernel.
    return Tokens(model, FullCache(pairs, length), lambda position: {"full_attention": None}, first, length - 1)
