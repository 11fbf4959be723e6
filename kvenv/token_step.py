"""One more token of every row: where its pairs go and what it sees is known beforehand instead of looked for."""

from __future__ import annotations

import torch
from torch import Tensor

from kvenv.cache import SlotCache, write


class TokenStep:
    """Decodes a token at a time into slots that are known to be free, until the next eviction.

    The tensors of :meth:`attend` stay where they are, and it depends on nothing else: it can be compiled and captured.

    Parameters
    ----------
    slots : SlotCache
        The cache; its number of slots stays the same.
    remember : bool
        Whether queries are kept in the slots' ``queries``.
    compileable : bool
        Whether :meth:`attend` is to be compiled. If not, views of the tensors are made once for all.

    Attributes
    ----------
    taken : int
        Tokens of every row since :meth:`refresh`.
    """

    def __init__(self, slots: SlotCache, remember: bool, compileable: bool) -> None:
        self._slots, self._remember = slots, remember
        self.capacity, self.taken = slots.capacity, 0
        positions, device = slots.positions, slots.positions.device
        layers, rows = positions.shape[:2]
        # Slots, and places of queries, are numbered through a layer, so that one index says where something goes.
        heads = torch.arange(rows * slots.kv_heads, device=device)
        self._first, self._slot = heads * slots.capacity, heads.expand(layers, -1).clone()
        asking = torch.arange(rows * slots.kv_heads * slots.groups, device=device)
        self._first_place, self._place = (asking * slots.interval).view(rows, -1), asking
        self._ahead, self._places_ahead = self._slot[None], self._place[None]
        self._bias = torch.zeros(positions.shape, dtype=slots.keys[0].dtype, device=device)
        if positions.is_cuda:
            self._mark_static()
        self._views = None if compileable else [self._view(layer) for layer in range(layers)]

    def refresh(self, anchor: Tensor, tokens: int) -> None:
        """Look which slots are free: after an eviction, or after a call of several tokens.

        Parameters
        ----------
        anchor : Tensor (N,) int64
            Where a window of each row begins.
        tokens : int
            How many tokens of each row come before this is called again.
        """
        slots, held = self._slots, self._slots.positions >= 0
        free = held.to(torch.int8).argsort(dim=-1, stable=True)[..., :tokens]
        self._ahead = _in_place(self._ahead, free.flatten(1, 2).permute(2, 0, 1) + self._first)
        self._bias.copy_(~held).mul_(torch.finfo(self._bias.dtype).min / 2)
        if self._remember:
            later = torch.arange(free.shape[-1], device=anchor.device)[:, None]
            place = (slots.next_position - anchor + later) % slots.interval
            self._places_ahead = _in_place(self._places_ahead, (place[..., None] + self._first_place).flatten(1))
        self.taken = 0

    def state(self) -> list[Tensor]:
        """Return the tensors that :meth:`refresh` writes, where it leaves them from then on for as many tokens."""
        return [self._bias, self._ahead, self._places_ahead]

    def settle(self) -> None:
        """Let the cache take in the pairs that were written since :meth:`refresh`."""
        slots, taken = self._slots, self.taken
        if not taken:
            return
        where = (self._ahead[:taken] - self._first).permute(1, 2, 0).unflatten(1, slots.positions.shape[1:3])
        new = slots.next_position[:, None] + torch.arange(taken, device=where.device)
        slots.positions.scatter_(3, where, new[:, None].expand(where.shape))
        slots.next_position += taken
        for layer, written in enumerate(where):
            slots.settle(layer, written, new)
        self.taken = 0

    def advance(self) -> None:
        """Make the next free slots those of the next tokens, which see them."""
        self._slot.copy_(self._ahead[self.taken])
        self._bias.flatten(1).scatter_(1, self._slot, 0.0)
        if self._remember:
            self._place.copy_(self._places_ahead[self.taken])
        self.taken += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Write the tokens' pairs to their slots and return the attention of their queries (N, H * G, 1, D).

        Parameters are those of :meth:`kvenv.attention.HandedCache.attend`.
        """
        slots, rows = self._slots, self._bias.shape[1]
        if len(key) != rows:
            raise ValueError(f"the cache has {rows} rows, not the batch's {len(key)}: make a new one")
        keys, values, bias, slot = self._view(layer) if self._views is None else self._views[layer]
        write(keys, slot, key)
        write(values, slot, value)
        # The queries of a group take the place of the tokens of a window.
        by_head = query.view(rows, slots.kv_heads, slots.groups, slots.head_dim)
        if self._remember:
            write(slots.queries[layer], self._place, by_head)
        output = torch.nn.functional.scaled_dot_product_attention(by_head, keys, values, attn_mask=bias, scale=scaling)
        return output.view(query.shape)

    def _view(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a layer's pairs, mask (N, H, G, C), and where the token's pairs go."""
        slots = self._slots
        bias = self._bias[layer][:, :, None].expand(-1, -1, slots.groups, -1)
        return slots.keys[layer], slots.values[layer], bias, self._slot[layer]

    def _mark_static(self) -> None:
        """Tell CUDA graphs that these tensors are written in place and never move."""
        queries = self._slots.queries if self._remember else []
        for tensor in (self._bias, self._slot, self._place, *self._slots.keys, *self._slots.values, *queries):
            torch._dynamo.mark_static_address(tensor)


def _in_place(kept: Tensor, new: Tensor) -> Tensor:
    """Return a tensor's new value, where it was if the shape is the same: what is captured reads it there."""
    return kept.copy_(new) if kept.shape == new.shape else new
