"""Paired evaluation: what policies lose on the same traces, at the same budgets, over the same scored tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from kvenv.decode import Losses
from kvenv.finite import check_run, lost_rows
from kvenv.golden import FutureAttention, expected_future, future_attention
from kvenv.identity import check_policy
from kvenv.layerwise import Policy, check_budget, first_decisions, rollout
from kvenv.lookahead import resampled
from kvenv.memory import in_halves, side_by_side
from kvenv.models import check_tokens
from kvenv.rewards import low_entropy
from kvenv.state import Protection
from kvenv.traces import Trace, TraceSource

FULL = "full"
"""The name under which rows hold the full cache: a policy that never evicts."""


@dataclass(frozen=True)
class Row:
    """One policy on one trace, or one example of a task, with one seed at one budget. Losses are in nats.

    Attributes
    ----------
    policy, traces, split, trace : str, str, str, int
        Who, and on what: the name of the traces or of the task, and a trace's id in the split.
    seed : int
        Seed of the noise, and of sampled answers; policies without noise have equal rows for all seeds.
    budget, interval, schedule : int, int, str
        B, W and the schedule.
    score_from : int
        Only targets at positions above this one are scored, and answers that start above it; 0 for tasks.
    scored_tokens, scored_answers : int
        How many targets and answers that are.
    lm_loss, full_lm_loss : float or None
        Mean NLL of the scored targets, and the full cache's. None for tasks that are answered.
    answer_loss, full_answer_loss : float or None
        Mean NLL of the scored answers' tokens, or of a right choice's, and the full cache's. None where there is none.
    answer_accuracy : float or None
        Share of scored answers of which every token is the most likely one.
    low_entropy_increase : float or None
        Mean of NLL minus full-cache NLL over the 80 % of the scored targets with the least full-cache entropy.
    agreement_with_golden : float or None
        Share of evicted pairs that golden would have evicted from the same states; None for the full cache.
    kept_fraction : float or None
        Pairs that a scored target's query sees over those that it would see in the full cache, mean over the targets.
    loss_by_entropy, full_loss_by_entropy : sequence of float, or None
        Mean NLL of the scored targets, and the full cache's, by tenth of their full-cache entropy; None if not asked.
    score : float or None
        What the task's score says of the answer, between 0 and 1.
    generated_tokens : int or None
        How long the generated answer is.
    truncated : bool or None
        Whether it reached the most tokens that it could have.
    """

    policy: str
    traces: str
    split: str
    trace: int
    seed: int
    budget: int
    interval: int
    schedule: str
    score_from: int
    scored_tokens: int = 0
    scored_answers: int = 0
    lm_loss: float | None = None
    full_lm_loss: float | None = None
    answer_loss: float | None = None
    full_answer_loss: float | None = None
    answer_accuracy: float | None = None
    low_entropy_increase: float | None = None
    agreement_with_golden: float | None = None
    kept_fraction: float | None = None
    loss_by_entropy: Sequence[float] | None = None
    full_loss_by_entropy: Sequence[float] | None = None
    score: float | None = None
    generated_tokens: int | None = None
    truncated: bool | None = None


PARTS_BY_ENTROPY = 10
"""Into how many equal parts targets are split by their entropy."""


def evaluate(
    policies: Mapping[str, Policy | None],
    source: TraceSource,
    trace_ids: Sequence[int],
    *,
    model: PreTrainedModel,
    budgets: Sequence[int],
    interval: int = 16,
    schedule: str = "periodic",
    protection: Protection | None = None,
    seeds: Sequence[int] = (0,),
    score_from: int | None = None,
    batch_size: int = 16,
    by_entropy: bool = False,
) -> Iterator[list[Row]]:
    """Run policies on traces and yield rows as they come: one batch of traces after another, one policy at a time.

    What doesn't depend on the policy is computed once a batch: full-cache losses and golden utilities, again only for
    budgets whose windows are aligned differently. Policies without noise run once, whatever the number of seeds.

    Parameters
    ----------
    policies : mapping of str to Policy or None
        Policies by the name they get in the rows; None is the full cache.
    source : TraceSource
        From :func:`kvenv.load_traces`, with the same schedule.
    trace_ids : sequence of int
        Which of its traces.
    model : PreTrainedModel
        A causal LM on kvenv's attention.
    budgets : sequence of int
        Each B.
    interval, schedule, protection
        As in :func:`kvenv.rollout`.
    seeds : sequence of int
        Seeds of the noise.
    score_from : int, optional
        See :class:`Row`; by default the first position that every budget decides before: the largest budget plus
        interval, or the longest prompt under the schedule ``prefill``.
    batch_size : int
        Traces decoded side by side.
    by_entropy : bool
        Whether rows have the losses by the targets' entropy.

    Yields
    ------
    list of Row
        Of one batch, budget and policy (in that order), by trace and seed.

    Raises
    ------
    ValueError
        If a budget, seed, trace or need is impossible; the message names it.
    FloatingPointError
        If the LLM's logits or a policy's priorities are NaN; the message names traces and layer.
    MemoryError
        If a trace alone exceeds the memory. Where several do, a warning says that half as many are decoded side by side
        from then on: rows don't depend on that, but for the rounding of the LLM's numbers.
    """
    protection = protection or Protection(recent=interval)
    check_cells(batch_size, policies=policies, budgets=budgets, seeds=seeds, traces=trace_ids)
    if score_from is None:
        score_from = max(budgets) + interval if schedule == "periodic" else source.max_prompt_length
    for policy in policies.values():
        check_policy(policy, model)
    setting = _Setting(tuple(budgets), interval, schedule, protection, score_from, by_entropy)
    fits = batch_size
    for start in range(0, len(trace_ids), batch_size):
        parts = _batches(model, source, trace_ids[start : start + batch_size], setting, fits)
        for budget in budgets:
            for name, policy in policies.items():
                rows = partial(_Batch.rows, name=name, policy=policy, budget=budget, seeds=seeds)
                yield in_halves(parts, rows, _Batch.halves)
        fits = min(fits, max(len(part.ids) for part in parts))


def check_cells(batch_size: int, **axes: Collection[object]) -> None:
    """Refuse a comparison without any cell, or with one twice.

    Raises
    ------
    ValueError
        Naming what is impossible.
    """
    for name, values in axes.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} {list(values)} must hold at least one and nothing twice")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")


def kept_fraction(
    length: int, first_decision: int, budget: int, interval: int, schedule: str, score_from: int
) -> float:
    """Return the mean over scored targets of the pairs seen over those of the full cache.

    It depends on nothing else: every (layer, KV head) evicts down to its budget whatever the policy ranks.
    """
    fed = np.arange(score_from, length - 1)
    since = fed - first_decision
    kept = min(budget, first_decision)
    in_window = since % interval if schedule == "periodic" else since
    seen = np.where(since >= 0, kept + in_window + 1, fed + 1)
    return float(np.mean(np.minimum(seen, fed + 1) / (fed + 1)))


@dataclass(frozen=True)
class _Setting:
    """What all rows of a call share."""

    budgets: tuple[int, ...]
    interval: int
    schedule: str
    protection: Protection
    score_from: int
    by_entropy: bool

    def check(self, trace: Trace) -> None:
        """Refuse a trace on which a budget is impossible or nothing is scored."""
        for budget in self.budgets:
            check_budget(budget, self.protection, trace, self.interval)
        if len(trace.tokens) <= self.score_from + 1:
            raise ValueError(
                f"trace {trace.name!r} has {len(trace.tokens)} tokens, but only targets above position "
                f"{self.score_from} are scored (budgets {list(self.budgets)}, interval {self.interval}): "
                "choose longer traces or smaller budgets"
            )
        if self.by_entropy and (scored := len(trace.tokens) - 1 - self.score_from) < PARTS_BY_ENTROPY:
            raise ValueError(
                f"trace {trace.name!r} has {scored} targets above position {self.score_from}, too few for "
                f"{PARTS_BY_ENTROPY} parts by entropy: choose longer traces or smaller budgets"
            )
        if self.schedule == "prefill" and trace.prompt_length > self.score_from:
            raise ValueError(
                f"trace {trace.name!r} has a prompt of {trace.prompt_length} tokens, more than score_from "
                f"{self.score_from}: under schedule 'prefill' no prompt may be longer"
            )


@dataclass(frozen=True)
class _TraceLosses:
    """Losses of one trace: entry t - 1 belongs to target t."""

    nll: np.ndarray
    entropy: np.ndarray
    correct: np.ndarray


class _Batch:
    """Some traces side by side, with what all policies share."""

    def __init__(self, model: PreTrainedModel, source: TraceSource, ids: Sequence[int], setting: _Setting) -> None:
        self.model, self.source, self.ids, self.setting = model, source, list(ids), setting
        self.traces = [source[trace_id] for trace_id in ids]
        for trace in self.traces:
            setting.check(trace)
            check_tokens(model, trace.tokens, f"trace {trace.name!r}")
        self._golden: dict[int, FutureAttention] = {}
        self._expected: dict[int, FutureAttention] = {}
        self._full: list[_TraceLosses] = []

    def halves(self) -> list[_Batch]:
        """Return the same traces in two batches, if there are two."""
        return _batches(self.model, self.source, self.ids, self.setting, -(-len(self.ids) // 2))

    def rows(self, name: str, policy: Policy | None, budget: int, seeds: Sequence[int]) -> Iterator[Row]:
        """Yield the rows of a policy at a budget."""
        if policy is not None and "noise" in policy.needs:
            results = [self._run(policy, budget, seed) for seed in seeds]
        else:
            results = [self._run(policy, budget, seeds[0])] * len(seeds)
        for index in range(len(self.ids)):
            for seed, (losses, agreement) in zip(seeds, results, strict=True):
                yield self._row(name, policy, index, budget, seed, losses[index], agreement[index])

    def golden(self, budget: int) -> FutureAttention:
        """Return the golden utilities for a budget, from the pass that also gives the full-cache losses."""
        key = self._alignment(budget)
        if key not in self._golden:
            future, losses, batch = future_attention(
                self.model, self._tokens(), interval=self.setting.interval, anchors=self._anchors(budget)
            )
            self._golden[key] = future
            if not self._full:
                length = self._longest - 1
                aligned = Losses(*(batch.by_position(x, length) for x in (losses.nll, losses.entropy, losses.correct)))
                names = [trace.name for trace in self.traces]
                check_run(FULL, names, lost_rows(aligned.nll, aligned.entropy), None)
                self._full = self._by_trace(aligned)
        return self._golden[key]

    def expected(self, budget: int) -> FutureAttention:
        """Return the utilities averaged over continuations, for all budgets with the same alignment."""
        key = self._alignment(budget)
        if key not in self._expected:
            # The smallest budget of this alignment decides first: its decisions include those of the others.
            anchors = self._anchors(min(other for other in self.setting.budgets if self._alignment(other) == key))
            continuations = [
                resampled(self.source, trace_id, self._cuts(trace, anchor))
                for trace_id, trace, anchor in zip(self.ids, self.traces, anchors, strict=True)
            ]
            with side_by_side(len(self.ids), self._longest):
                self._expected[key] = expected_future(
                    self.model, self._tokens(), continuations, interval=self.setting.interval, anchors=anchors
                )
        return self._expected[key]

    def _alignment(self, budget: int) -> int:
        """Budgets of equal alignment have their windows in the same places."""
        return budget % self.setting.interval if self.setting.schedule == "periodic" else 0

    def _anchors(self, budget: int) -> list[int]:
        return first_decisions(
            self.traces, budget=budget, interval=self.setting.interval, schedule=self.setting.schedule
        )

    def _cuts(self, trace: Trace, first: int) -> Sequence[int]:
        """Positions before which decisions fall."""
        return (
            range(first, len(trace.tokens) - 1, self.setting.interval)
            if self.setting.schedule == "periodic"
            else [first]
        )

    @property
    def _longest(self) -> int:
        return max(len(trace.tokens) for trace in self.traces)

    def _tokens(self) -> list[np.ndarray]:
        return [trace.tokens for trace in self.traces]

    def _run(self, policy: Policy | None, budget: int, seed: int) -> tuple[list[_TraceLosses], Sequence[float | None]]:
        """Return the losses and the agreement with golden of each trace."""
        golden = self.golden(budget)
        if policy is None:
            return self._full, [None] * len(self.ids)
        result = rollout(
            policy,
            self.traces,
            model=self.model,
            budget=budget,
            interval=self.setting.interval,
            schedule=self.setting.schedule,
            protection=self.setting.protection,
            future=golden,
            expected_future=self.expected(budget) if "expected_future" in policy.needs else None,
            agreement=True,
            seed=seed,
            rollouts=self.ids,
        )
        agreement = result.agreement.tolist() if result.agreement is not None else [None] * len(self.ids)
        return self._by_trace(result.losses), agreement

    def _by_trace(self, losses: Losses) -> list[_TraceLosses]:
        arrays = [x.cpu().numpy() for x in (losses.nll, losses.entropy, losses.correct)]
        return [
            _TraceLosses(*(x[row, : len(trace.tokens) - 1] for x in arrays)) for row, trace in enumerate(self.traces)
        ]

    def _row(
        self,
        name: str,
        policy: Policy | None,
        index: int,
        budget: int,
        seed: int,
        losses: _TraceLosses,
        agreement: float | None,
    ) -> Row:
        trace, full, setting = self.traces[index], self._full[index], self.setting
        length, scored = len(trace.tokens), slice(setting.score_from, None)
        answers = [slice(start - 1, stop - 1) for start, stop in trace.answers if start > setting.score_from]
        first = length if policy is None else self._anchors(budget)[index]
        parts = (
            np.array_split(np.argsort(full.entropy[scored], kind="stable"), PARTS_BY_ENTROPY)
            if setting.by_entropy
            else None
        )
        return Row(
            policy=name,
            traces=self.source.name,
            split=self.source.split,
            trace=self.ids[index],
            seed=seed,
            budget=budget,
            interval=setting.interval,
            schedule=setting.schedule,
            score_from=setting.score_from,
            scored_tokens=length - 1 - setting.score_from,
            scored_answers=len(answers),
            lm_loss=_mean(losses.nll[scored]),
            full_lm_loss=_mean(full.nll[scored]),
            answer_loss=_mean([x for answer in answers for x in losses.nll[answer]]) if answers else None,
            full_answer_loss=_mean([x for answer in answers for x in full.nll[answer]]) if answers else None,
            answer_accuracy=_mean([float(losses.correct[answer].all()) for answer in answers]) if answers else None,
            low_entropy_increase=_mean(
                (losses.nll - full.nll)[scored][low_entropy(torch.from_numpy(full.entropy[scored])).numpy()]
            ),
            agreement_with_golden=agreement,
            kept_fraction=kept_fraction(length, first, budget, setting.interval, setting.schedule, setting.score_from),
            loss_by_entropy=[_mean(losses.nll[scored][part]) for part in parts] if parts else None,
            full_loss_by_entropy=[_mean(full.nll[scored][part]) for part in parts] if parts else None,
        )


def _batches(
    model: PreTrainedModel, source: TraceSource, ids: Sequence[int], setting: _Setting, size: int
) -> list[_Batch]:
    """Return traces in batches of that size."""
    return [_Batch(model, source, ids[start : start + size], setting) for start in range(0, len(ids), size)]


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64))
