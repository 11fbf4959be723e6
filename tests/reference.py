"""Plain references for the invariants: full forwards with masked keys, one trace at a time, loops in token order.

Nothing here knows kvenv's cache, attention or golden pass. ``T`` is the number of fed tokens: a trace's last token is
only a target.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NEVER = 1 << 30
"""Position of the first query that doesn't see a key, for a key that stays."""

Array = NDArray[np.float64]


@dataclass
class MaskedRun:
    """One trace through a full forward in which every (layer, KV head) has lost some keys from some query on.

    Attributes
    ----------
    lost_at : Tensor (L, H, T) int64
        Position of the first query that doesn't see a key.
    losses : Tensor (T,)
        NLL of the targets 1, 2, ...
    attention : list of Array (H * G, T, T)
        Attention probabilities by layer: queries x keys.
    queries, keys, values : list of Tensor (heads, T, D)
        By layer, rotated.
    """

    lost_at: Tensor
    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    attention: list[Array] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


_current: list[MaskedRun] = []


def _masked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Eager attention with a mask per KV head; float64 stays float64, unlike in transformers' own."""
    run = _current[0]
    tokens, groups = key.shape[2], query.shape[1] // key.shape[1]
    now = torch.arange(tokens)
    visible = (now[None, :] <= now[:, None]) & (now[:, None] < run.lost_at[module.layer_idx][:, None, :])
    logits = query[0] @ key[0].repeat_interleave(groups, dim=0).transpose(1, 2) * scaling
    logits = logits.masked_fill(~visible.repeat_interleave(groups, dim=0), -torch.inf)
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    run.attention.append(probabilities.double().numpy())
    run.queries.append(query[0])
    run.keys.append(key[0])
    run.values.append(value[0])
    output = probabilities.to(value.dtype) @ value[0].repeat_interleave(groups, dim=0)
    return output.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register("kvenv-test-masked", _masked_attention)
AttentionMaskInterface.register("kvenv-test-masked", lambda *args, **kwargs: None)

_copies: dict[tuple[PreTrainedModel, str], PreTrainedModel] = {}


def copy_with(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """Return a copy of a model that uses another attention implementation; the same copy for the same model."""
    key = (model, attention)
    if key not in _copies:
        _copies[key] = copy.deepcopy(model)
        _copies[key].set_attn_implementation(attention)
    # Of now: a test may have changed the model's when the copy was made, or since.
    _copies[key].generation_config = copy.deepcopy(model.generation_config)
    return _copies[key]


def nll(model: PreTrainedModel, tokens: Array) -> Tensor:
    """Return the losses (T,) of a trace under a plain forward without any cache."""
    ids = torch.as_tensor(tokens)[None]
    with torch.no_grad():
        logits = model(ids[:, :-1], use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def plain_losses(model: PreTrainedModel, tokens: Array) -> Tensor:
    """Return the losses (T,) of an untouched copy of the model on SDPA."""
    return nll(copy_with(model, "sdpa"), tokens)


def nothing_lost(model: PreTrainedModel, tokens: Array) -> Tensor:
    """Return the ``lost_at`` (L, H, T) of a full cache."""
    config = model.config
    return torch.full((config.num_hidden_layers, config.num_key_value_heads, len(tokens) - 1), NEVER)


def masked_run(model: PreTrainedModel, tokens: Array, lost_at: Tensor | None = None) -> MaskedRun:
    """Run one trace with keys masked per layer and KV head from the given queries on."""
    run = MaskedRun(nothing_lost(model, tokens) if lost_at is None else lost_at)
    _current[:] = [run]
    run.losses = nll(copy_with(model, "kvenv-test-masked"), tokens)
    return run


def windows(tokens: int, first_decision: int, interval: int) -> list[range]:
    """Return the windows of T fed tokens: boundaries at the first decision plus or minus multiples of the interval."""
    bounds = [0] + [t for t in range(1, tokens) if (t - first_decision) % interval == 0] + [tokens]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def golden_utility(attention: Array, groups: int, first_decision: int, interval: int, reduce: str) -> dict[int, Array]:
    """Return the utility (H, T) at every decision, from one layer's attention (H * G, T, T).

    ForesightKV: the largest mean over (query head, query of a window) among later windows; KVP: the sum over later
    queries of the largest in the group.
    """
    tokens = attention.shape[1]
    heads = attention.shape[0] // groups
    result = {}
    spans = windows(tokens, first_decision, interval)
    for decision in (span.start for span in spans):
        utility = np.zeros((heads, tokens))
        for head in range(heads):
            group = attention[head * groups : (head + 1) * groups]
            for span in spans:
                if span.start < decision:
                    continue
                if reduce == "max":
                    block = group[:, span.start : span.stop].mean(axis=(0, 1))
                    utility[head] = np.maximum(utility[head], block)
                else:
                    for query in span:
                        utility[head] += group[:, query].max(axis=0)
        result[decision] = utility
    return result


def window_statistics(rows: Array, spans: list[range], key: int) -> list[float]:
    """Return the eight statistics of a key over the windows so far, from one query head's attention (T, T)."""
    window = [float(rows[query, key]) if key <= query else 0.0 for query in spans[-1]]
    cumulative = decayed = 0.0
    for span in spans:
        received = sum(float(rows[query, key]) for query in span if query >= key)
        cumulative += received
        decayed = 0.9 * decayed + received
    return [
        max(window),
        min(window),
        sum(window),
        sum(window[-8:]),
        sum(window[-16:]),
        sum(window[-32:]),
        cumulative,
        decayed,
    ]


def keep(priorities: dict[int, float], protected: set[int], budget: int) -> set[int]:
    """Return the positions that stay: the protected, then the highest priorities, the newer where they are equal."""
    ranked = sorted(priorities, key=lambda position: (priorities[position], position), reverse=True)
    return protected | set(ranked[: max(0, budget - len(protected))])
