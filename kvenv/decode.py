"""The decode loop: feed known tokens through a frozen LLM and score the targets they predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.attention import CACHE, HandedCache
from kvenv.memory import side_by_side

LOGITS_AT_ONCE = 1 << 24
"""Logits that are held at a time: long traces of large vocabularies are scored in chunks ..."""

STATES_AT_ONCE = 512
"""... of no fewer hidden states than these: a product of few takes a GPU as long as reading the head's weights."""


@dataclass(frozen=True)
class Losses:
    """Scores of the targets that S fed tokens predict; zero (False) where padding was fed.

    Attributes
    ----------
    nll : Tensor (N, S) float32
        Negative log-likelihood in nats.
    entropy : Tensor (N, S) float32
        Entropy of the predicted distribution in nats.
    correct : Tensor (N, S) bool
        Whether the target is the most likely token.
    """

    nll: Tensor
    entropy: Tensor
    correct: Tensor


@dataclass(frozen=True)
class Batch:
    """Traces side by side, left-padded so that window boundaries of all rows fall into the same columns.

    Column c of row n holds the token at position c - pad[n]. The last token of a trace is only a target.

    Attributes
    ----------
    tokens, targets : Tensor (N, S) int64
        Fed tokens and those they predict; 0 where padding.
    positions : Tensor (N, S) int64
        Absolute positions, negative before the trace begins.
    valid : Tensor (N, S) bool
        Where a token is fed.
    pad : Tensor (N,) int64
        Columns before each trace.
    prompt_length : Tensor (N,) int64
        Prompt tokens of each trace.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    valid: Tensor
    pad: Tensor
    prompt_length: Tensor

    def by_position(self, x: Tensor, length: int) -> Tensor:
        """Return per-column values (N, S) as per-target values (N, length), zero beyond: entry t - 1 is of target t."""
        where = torch.arange(length, device=x.device) + self.pad[:, None]
        return x.gather(1, where.clamp(max=x.shape[1] - 1)) * (where < x.shape[1])


def collate(
    traces: Sequence[np.ndarray],
    *,
    prompt_lengths: Sequence[int] | None = None,
    anchors: Sequence[int] | int = 0,
    interval: int = 1,
    stop: int | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """Put traces side by side so that every row's anchor starts a window in one common column.

    Parameters
    ----------
    traces : sequence of array (T_n,)
        Token ids.
    prompt_lengths : sequence of int, optional
        Prompt tokens of each trace; 0 if not given.
    anchors : int or sequence of int
        Position of each trace that must fall on a window boundary, e.g. the capacity.
    interval : int
        W, the width of a window.
    stop : int, optional
        Feed only the tokens before this position (before each row's anchor where -1).
    device : torch.device or str
        Where to put the batch.

    Returns
    -------
    Batch
        S is a multiple of W.
    """
    rows = len(traces)
    anchor = np.broadcast_to(np.asarray(anchors), rows)
    boundary = int(-(-anchor.max() // interval) * interval)
    pad = boundary - anchor
    lengths = np.array([len(trace) - 1 for trace in traces])
    if stop is not None:
        lengths = np.minimum(lengths, anchor if stop < 0 else stop)
    columns = int(-(-(pad + lengths).max() // interval) * interval)
    tokens, targets = np.zeros((rows, columns), np.int64), np.zeros((rows, columns), np.int64)
    for row, trace in enumerate(traces):
        fed = slice(pad[row], pad[row] + lengths[row])
        tokens[row, fed], targets[row, fed] = trace[: lengths[row]], trace[1 : lengths[row] + 1]
    positions = np.arange(columns) - pad[:, None]
    valid = (positions >= 0) & (positions < lengths[:, None])
    arrays = (tokens, targets, positions, valid, pad, np.asarray(prompt_lengths or [0] * rows))
    return Batch(*(torch.as_tensor(array, device=device) for array in arrays))


@torch.no_grad()
def feed(
    model: PreTrainedModel,
    cache: HandedCache,
    tokens: Tensor,
    targets: Tensor,
    positions: Tensor,
    valid: Tensor,
) -> Losses:
    """Feed tokens into the cache and score their targets.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM on kvenv's attention.
    cache : HandedCache
        Takes the new pairs and attends.
    tokens, targets, positions, valid : Tensor (N, S)
        As in :class:`Batch`.

    Returns
    -------
    Losses
        Of the S targets.
    """
    return score(model, read(model, cache, tokens, positions, valid), targets, valid)


@torch.no_grad()
def read(model: PreTrainedModel, cache: HandedCache, tokens: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    """Feed tokens into the cache without scoring; return the last hidden states (N, S, width)."""
    cache.expect(positions, valid)
    return model.base_model(
        input_ids=tokens, position_ids=positions.clamp(min=0), use_cache=True, **{CACHE: cache}
    ).last_hidden_state


def score(model: PreTrainedModel, hidden: Tensor, targets: Tensor, valid: Tensor) -> Losses:
    """Return the losses of ``targets`` (N, S) under the model's head applied to ``hidden`` (N, S, width)."""
    head = model.get_output_embeddings()
    chunk = max(1, max(STATES_AT_ONCE, LOGITS_AT_ONCE // head.weight.shape[0]) // hidden.shape[0])
    parts = []
    for states, target in zip(hidden.split(chunk, dim=1), targets.split(chunk, dim=1), strict=True):
        logits = head(states)
        logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        told = logp.gather(-1, target[..., None]).squeeze(-1)
        parts.append((-told, -(logp.exp() * logp).sum(dim=-1), told == logp.amax(dim=-1)))
    nll, entropy, correct = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return Losses(nll * valid, entropy * valid, correct & valid)


@torch.no_grad()
def full_cache_losses(model: PreTrainedModel, traces: Sequence[np.ndarray]) -> Losses:
    """Return the losses of traces under the plain model, without eviction.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM.
    traces : sequence of array (T_n,)
        Token ids.

    Returns
    -------
    Losses
        Per target: entry t - 1 belongs to target t; (N, T - 1) with T the longest trace, zero beyond a trace's end.

    Raises
    ------
    MemoryError
        If memory runs out.
    """
    with side_by_side(len(traces), max(map(len, traces))):
        batch = collate(traces, device=model.device)
        # Padding is at the end, where the causal mask hides it.
        hidden = model.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        return score(model, hidden, batch.targets, batch.valid)
