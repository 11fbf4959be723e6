"""kvenv's attention as Hugging Face models call it: a registered attention function and a registered mask function.

A model switched to it (:func:`use_kvenv_attention`) behaves as with SDPA until a :class:`HandedCache` is passed as its
cache. The attention function doesn't receive the cache, so ``Cache.update`` hands (cache, layer, new
keys) over and the function takes and clears it; nothing is kept on modules.
"""

from __future__ import annotations

import threading
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sdpa_mask

from kvenv.identity import cache_shape

NAME = "kvenv"

CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"
"""The name of models' argument for a cache: transformers 5.24 gave it another."""

UNMASKED, READY = (0, 0), (0, 1)
"""What a :class:`HandedCache` answers to the question for mask sizes: that it needs no mask, and also that it has got
ready for the call, which then can be compiled: models leave a mask of 4 dimensions alone."""

_handover = threading.local()


class HandedCache(Cache):
    """A Hugging Face cache that computes attention itself, over whatever it keeps.

    Parameters
    ----------
    model : PreTrainedModel
        The decoder it belongs to; its configuration gives the shapes.

    Raises
    ------
    ValueError
        If the model isn't on kvenv's attention: it would never ask this cache, and nothing would be evicted.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(layers=[])
        if model.config._attn_implementation != NAME:
            raise ValueError(
                f"model {type(model).__name__} is on attention {model.config._attn_implementation!r}, which knows no "
                "eviction: get it from kvenv.load_model, or switch it by kvenv.attention.use_kvenv_attention"
            )
        self.num_layers, self.kv_heads, self.groups, self.head_dim = cache_shape(model)
        self._fed: tuple[Tensor, Tensor] | None = None

    def expect(self, positions: Tensor, valid: Tensor) -> None:
        """Say what the next forward call feeds.

        Parameters
        ----------
        positions : Tensor (N, S) int64
            Absolute positions, rising by one along a row; columns that aren't valid may go below 0 or past the end.
        valid : Tensor (N, S) bool
            False for padding, which takes no slot that counts and changes nothing.
        """
        self._fed = (positions, valid)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, padding: Tensor | None
    ) -> Tensor:
        """Cache the new pairs and return the attention output of the new queries.

        Parameters
        ----------
        layer : int
            Index of the layer.
        query : Tensor (N, H * G, S, D)
            New queries, rotated.
        key, value : Tensor (N, H, S, D)
            New pairs, keys rotated.
        scaling : float
            Factor on the logits.
        padding : Tensor or None
            The model's padding mask (N, >= S) bool, if it was given one; a 4-D tensor if the cache said :data:`READY`.

        Returns
        -------
        Tensor (N, H * G, S, D)
        """
        raise NotImplementedError

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new pairs over to the attention function, which is called next."""
        _handover.pending = (self, layer_idx, key_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Say that this cache needs no mask built, see :func:`_mask`."""
        return UNMASKED

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return 0: the mask that it would shift isn't built."""
        return 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: any number of tokens can be seen."""
        return -1

    @property
    def is_linear(self) -> list[bool]:
        """Say that no layer is linear attention: since transformers 5.24, generate prepares prompts for others only."""
        return [False] * self.num_layers

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse beam search: rows have histories of their own."""
        raise ValueError("beam search isn't supported with a kvenv cache: generate with num_beams=1")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse assisted decoding: evicted pairs don't come back."""
        raise ValueError("assisted decoding isn't supported with a kvenv cache: generate without an assistant")

    def __len__(self) -> int:
        return self.num_layers


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention interface of Hugging Face models: the pending cache's attention, or SDPA where there is none."""
    pending, _handover.pending = getattr(_handover, "pending", None), None
    # Another key means that a forward died between update and attention: what it left is not ours.
    if pending is None or pending[2] is not key:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    cache, layer, _ = pending
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = cache.attend(layer, query, key, value, scaling, attention_mask)
    return output.transpose(1, 2).contiguous(), None


def _mask(kv_length: int, kv_offset: int = 0, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Mask interface of Hugging Face models: SDPA's mask, or for a HandedCache the 2-D padding mask unchanged."""
    sizes = (kv_length, kv_offset)
    if sizes == READY:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=kwargs["device"])
    if sizes == UNMASKED:
        return attention_mask
    return sdpa_mask(kv_length=kv_length, kv_offset=kv_offset, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


_before: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""What models were on before they were switched."""


def use_kvenv_attention(model: PreTrainedModel) -> bool:
    """Switch a model to kvenv's attention. Without a :class:`HandedCache` it goes on computing SDPA.

    Returns
    -------
    bool
        False if it was on it already.

    Raises
    ------
    ValueError
        If the model doesn't go through transformers' attention interface.
    """
    before = model.config._attn_implementation
    if before == NAME:
        return False
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(
            f"model {type(model).__name__} doesn't go through transformers' attention interface: "
            "kvenv supports decoder-only models that do (Llama, Qwen2, Qwen3, Mistral, Phi3, ...)"
        )
    _before[model] = before
    return True


def restore(model: PreTrainedModel) -> None:
    """Switch a model back to the attention it was on before kvenv.

    Raises
    ------
    ValueError
        If kvenv didn't switch it.
    """
    if model not in _before or model.config._attn_implementation != NAME:
        raise ValueError(f"model {type(model).__name__} wasn't switched to kvenv's attention: nothing is to be undone")
    model.set_attn_implementation(_before.pop(model))


BEYOND = float(1 << 24)
"""A position that no query reaches, and the last up to which float32 tells positions apart."""


def causal_bias(reach: Tensor, held: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask of queries over slots: 0 where a query may see, half the lowest number elsewhere.

    Finite, because a padding query sees nothing and must not become NaN. Arithmetic instead of a selection by a mask,
    which takes a CPU twice as long.

    Parameters
    ----------
    reach : Tensor (..., S, 1)
        Position of each query, as at least float32.
    held : Tensor (..., 1, C)
        Position of each pair, :data:`BEYOND` where there is none, as at least float32.
    dtype : torch.dtype
        Of the mask.

    Returns
    -------
    Tensor (..., S, C)
    """
    return (reach - held).clamp_(-1, 0).to(dtype).mul_(torch.finfo(dtype).max / 2)


def attend_block(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Return the attention output of a block of queries, fused.

    Parameters
    ----------
    query : Tensor (N, H, G, S, D)
        Queries by the KV head they read.
    key, value : Tensor (N, H, C, D)
        Pairs.
    bias : Tensor (N, H or 1, S, C)
        Additive mask, see :func:`causal_bias`, of the dtype that attention is computed in.
    scaling : float
        Factor on the logits.

    Returns
    -------
    Tensor (N, H, G, S, D)
    """
    by_head = bias[:, :, None].expand(-1, query.shape[1], query.shape[2], -1, -1).flatten(2, 3)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.flatten(2, 3), key, value, attn_mask=by_head, scale=scaling
    )
    return output.view(query.shape)


def attention_probabilities(query: Tensor, key: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Return the attention probabilities (N, H, G, S, C) of a block of queries, at least float32.

    Parameters are those of :func:`attend_block`.
    """
    logits = (query.flatten(2, 3) @ key.transpose(-1, -2)).view(*query.shape[:-1], key.shape[2])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.mul_(scaling).add_(bias[:, :, None]).softmax(dim=-1)
