"""One more token of every row: where its pairs go and what it sees is kept up to date instead of looked for."""

from __future__ import annotations

import torch
from torch import Tensor

from kvenv.cache import SlotCache


class TokenStep:
    """Decodes a token at a time into slots that are known to be free, until the next eviction.

    All tensors stay where they are, and :meth:`attend` depends on nothing else: it can be compiled and captured.

    Parameters
    ----------
    slots : SlotCache
        The cache; its number of slots stays the same.
    remember : bool
        Whether queries are kept in the slots' ``queries``.

    Attributes
    ----------
    taken : int
        Tokens of every row since :meth:`refresh`.
    """

    def __init__(self, slots: SlotCache, remember: bool) -> None:
        self._slots, self._remember = slots, remember
        positions = slots.positions
        self.capacity, self.taken = slots.capacity, 0
        self._free = torch.zeros_like(positions)
        self._bias = torch.zeros(positions.shape, dtype=slots.keys.dtype, device=positions.device)
        # Slots are numbered through a layer, so that one index says where a pair goes.
        heads = positions[0, :, :, 0]
        self._first = torch.arange(heads.numel(), device=heads.device) * slots.capacity
        self._slot = self._first.expand(len(positions), -1).clone()
        self._rows = torch.arange(len(heads), device=heads.device)
        self._anchor, self._place = torch.zeros_like(self._rows), torch.zeros_like(self._rows)
        if positions.is_cuda:
            self._mark_static()

    def refresh(self, anchor: Tensor) -> None:
        """Look which slots are free: after an eviction, or after a call of several tokens.

        Parameters
        ----------
        anchor : Tensor (N,) int64
            Where a window of each row begins.
        """
        held = self._slots.positions >= 0
        self._free.copy_(held.to(torch.int8).argsort(dim=-1, stable=True))
        self._bias.copy_(~held).mul_(torch.finfo(self._bias.dtype).min / 2)
        self._anchor.copy_(anchor)

    def settle(self) -> None:
        """Let the cache take in the pairs that were written since :meth:`refresh`."""
        if self.taken:
            for layer, free in enumerate(self._free):
                self._slots.settle(layer, free[:, :, : self.taken])
        self.taken = 0

    def advance(self) -> None:
        """Make the next free slots those of the next tokens, which see them."""
        slots = self._slots
        slot = self._free[..., self.taken : self.taken + 1]
        slots.positions.scatter_(3, slot, slots.next_position[:, None, None].expand(slot.shape))
        self._bias.scatter_(3, slot, 0.0)
        torch.add(slot.flatten(1), self._first, out=self._slot)
        if self._remember:
            torch.remainder(slots.next_position - self._anchor, slots.interval, out=self._place)
        slots.next_position += 1
        self.taken += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Write the tokens' pairs to their slots and return the attention of their queries (N, H * G, 1, D).

        Parameters are those of :meth:`kvenv.attention.HandedCache.attend`.
        """
        slots = self._slots
        if len(key) != len(self._rows):
            raise ValueError(f"the cache has {len(self._rows)} rows, not the batch's {len(key)}: make a new one")
        keys, values = slots.keys[layer], slots.values[layer]
        for kept, new in ((keys, key), (values, value)):
            kept.view(-1, kept.shape[-1]).index_copy_(0, self._slot[layer], new.reshape(-1, new.shape[-1]))
        # The queries of a group take the place of the tokens of a window.
        by_head = query.view(*key.shape[:2], -1, query.shape[-1])
        if self._remember:
            slots.queries[layer].permute(0, 3, 1, 2, 4)[self._rows, self._place] = by_head
        bias = self._bias[layer][:, :, None].expand(-1, -1, by_head.shape[2], -1)
        output = torch.nn.functional.scaled_dot_product_attention(by_head, keys, values, attn_mask=bias, scale=scaling)
        return output.view(query.shape)

    def _mark_static(self) -> None:
        """Tell CUDA graphs that these tensors are written in place and never move."""
        own = [self._bias, self._slot, self._place, self._slots.keys, self._slots.values]
        for tensor in [*own, self._slots.queries] if self._remember else own:
            torch._dynamo.mark_static_address(tensor)
