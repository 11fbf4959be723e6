"""What a policy does to one trace: which tokens it keeps at each decision, what that costs, where golden disagrees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.golden import expected_future, future_attention
from kvenv.layerwise import Policy, check_budget, rollout
from kvenv.lookahead import resampled
from kvenv.ranking import eviction_order
from kvenv.state import LayerState, Protection
from kvenv.traces import Trace, TraceSource

NOTABLE = 0.5
"""Nats of loss increase from which on a token is marked."""
DISAGREES = 0.25
"""Share of the heads that must decide otherwise than golden for a token to be marked."""


@dataclass(frozen=True)
class Story:
    """What happened to one trace. T tokens, J decisions.

    Attributes
    ----------
    words : list of str
        Text of each token.
    decisions : list of int
        Position before which each decision fell.
    kept : array (J, T)
        Share of (layer, KV head)s that hold the token's pair after the decision; 0 for tokens still to come.
    disagreement : array (J, T)
        Share that evict the pair where golden would keep it, or keep it where golden would evict it.
    nll, full_nll : array (T,)
        Loss in nats under the policy and under the full cache; 0 for the first token, which nothing predicts.
    answer : array (T,) of bool
        Whether the token lies in an answer.
    """

    words: list[str]
    decisions: list[int]
    kept: np.ndarray
    disagreement: np.ndarray
    nll: np.ndarray
    full_nll: np.ndarray
    answer: np.ndarray

    def windows(self) -> Iterator[tuple[int, int, int]]:
        """Yield (decision's number, start, stop) of the tokens fed after each decision."""
        stops = [*self.decisions, len(self.words)][1:]
        for number, (start, stop) in enumerate(zip(self.decisions, stops, strict=True)):
            yield number, start, stop


class Recorder:
    """Adds up over layers and heads what is kept at each decision, and where golden would have decided otherwise."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.kept: dict[int, Tensor] = {}
        self.disagreement: dict[int, Tensor] = {}
        self.heads: dict[int, int] = {}

    def __call__(self, state: LayerState, order: Tensor, count: Tensor) -> None:
        """Take in one decision of one layer (one row)."""
        if state.future is None:
            raise ValueError("a story needs golden's utilities: pass future= and agreement=True to rollout")
        decision = int(state.next_position[0])
        golden = eviction_order(state.future, state.positions, state.mask)
        chosen = torch.arange(order.shape[-1], device=order.device) < count[..., None]
        evicted, golden_evicted = (torch.empty_like(chosen).scatter_(-1, o, chosen) for o in (order, golden))
        zeros = torch.zeros(self.length, device=order.device)
        where = state.positions.clamp(min=0).flatten()
        for table, heads in (
            (self.kept, state.filled & ~evicted),
            (self.disagreement, evicted != golden_evicted),
        ):
            table[decision] = table.get(decision, zeros).index_add(0, where, heads.flatten().to(zeros))
        self.heads[decision] = self.heads.get(decision, 0) + order.shape[1]

    def shares(self, table: dict[int, Tensor], decisions: Sequence[int]) -> np.ndarray:
        """Return a table (J, T) as shares of all heads."""
        rows = [(table[decision] / self.heads[decision]).cpu().numpy() for decision in decisions]
        return np.stack(rows) if rows else np.zeros((0, self.length))


def follow(
    policy: Policy | None,
    source: TraceSource,
    trace_id: int,
    *,
    model: PreTrainedModel,
    tokenizer: Any,
    budget: int,
    interval: int,
    protection: Protection,
    seed: int = 0,
) -> Story:
    """Roll a policy out on one trace and note what it keeps.

    Parameters
    ----------
    policy : Policy or None
        None is the full cache: no decisions.
    source, trace_id : TraceSource, int
        Which trace.
    model, tokenizer : transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase or None
        Without a tokenizer words are token ids.
    budget, interval, protection, seed
        As in :func:`kvenv.rollout`.

    Raises
    ------
    ValueError
        If the budget is impossible, or the trace can't be continued and the policy needs that.
    """
    trace = source[trace_id]
    check_budget(budget, protection, trace, interval)
    length, anchor = len(trace.tokens), budget + interval
    future, losses, batch = future_attention(model, [trace.tokens], interval=interval, anchors=anchor)
    full = batch.by_position(losses.nll, length - 1)[0]
    recorder, nll = Recorder(length), full
    if policy is not None:
        expected = None
        if "expected_future" in policy.needs:
            cuts = range(anchor, length - 1, interval)
            futures = resampled(source, trace_id, cuts)
            expected = expected_future(model, [trace.tokens], [futures], interval=interval, anchors=[anchor])
        result = rollout(
            policy,
            [trace],
            model=model,
            budget=budget,
            interval=interval,
            protection=protection,
            future=future,
            expected_future=expected,
            agreement=True,
            seed=seed,
            rollouts=[trace_id],
            on_eviction=recorder,
        )
        nll = result.losses.nll[0]
    decisions = sorted(recorder.kept)
    return Story(
        words=_words(trace, tokenizer),
        decisions=decisions,
        kept=recorder.shares(recorder.kept, decisions),
        disagreement=recorder.shares(recorder.disagreement, decisions),
        nll=np.pad(nll.cpu().numpy(), (1, 0)),
        full_nll=np.pad(full.cpu().numpy(), (1, 0)),
        answer=np.isin(np.arange(length), [i for start, stop in trace.answers for i in range(start, stop)]),
    )


def _words(trace: Trace, tokenizer: Any) -> list[str]:
    """Return the text of each token."""
    if tokenizer is None:
        return [str(token) for token in trace.tokens]
    return [text.strip() or repr(text)[1:-1] for text in (tokenizer.decode([token]) for token in trace.tokens)]
