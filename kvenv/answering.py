"""Paired evaluation of answers: policies generate, or choose, on the same prompts at the same budgets."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from kvenv.attention import CACHE
from kvenv.decode import full_cache_losses
from kvenv.evaluation import FULL, Row, check_cells, kept_fraction
from kvenv.finite import check_run, lost_rows
from kvenv.generation import EvictingCache
from kvenv.identity import check_policy
from kvenv.layerwise import Policy, rollout
from kvenv.memory import in_halves, side_by_side
from kvenv.models import check_positions, check_tokens
from kvenv.sampling import Finite, Sampling, check_sampling, own_settings
from kvenv.state import Protection
from kvenv.tasks.base import Choice, ChoiceTask, Question, QuestionTask, Score
from kvenv.traces import Trace

E = TypeVar("E", Question, Choice)


@dataclass(frozen=True)
class Decoding:
    """How examples are decoded.

    Attributes
    ----------
    interval, schedule, protection
        As in :class:`kvenv.EvictingCache`.
    held_out : bool
        Whether the question comes after the one eviction of the schedule ``prefill``, which sees the context alone.
    temperature : float
        Of sampling; 0 takes the likeliest token.
    top_p : float
        Share of the probability that is sampled from.

    Raises
    ------
    ValueError
        If a number is impossible, or a question is held out of an eviction that isn't once and for all.
    """

    interval: int
    schedule: str
    protection: Protection
    held_out: bool = False
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.held_out and self.schedule != "prefill":
            raise ValueError(f"questions can be held out of schedule 'prefill' only, not of {self.schedule!r}")
        check_sampling(self.temperature, self.top_p)

    def evicted_from(self, example: Question | Choice) -> int:
        """Return how many tokens come before the one eviction of the schedule ``prefill``."""
        return len(example.context) + (0 if self.held_out else len(example.question))

    def side_by_side(self, task: QuestionTask | ChoiceTask, batch_size: int) -> int:
        """Return how many examples are decoded side by side: a question that is held out is generated for alone."""
        return 1 if self.held_out and isinstance(task, QuestionTask) else batch_size

    def decided_before(self, task: QuestionTask | ChoiceTask) -> bool:
        """Return whether a task's first choice is made before the one eviction, so that all policies are the same."""
        if not isinstance(task, ChoiceTask) or self.schedule != "prefill" or self.held_out:
            return False
        return all(len(option) == 1 for option in task.examples[0].options)

    def check(self, example: Question | Choice, model: PreTrainedModel) -> None:
        """Refuse an example that can't be asked.

        Raises
        ------
        ValueError
            If the prompt is empty, has tokens that the model doesn't know, or is longer than its positions with its
            answer.
        """
        if not example.context or (self.held_out and not example.question):
            raise ValueError(f"{example.name}: the {'question' if example.context else 'prompt'} is empty")
        check_tokens(model, example.context + example.question, example.name)
        most = example.max_new_tokens if isinstance(example, Question) else max(map(len, example.options))
        length = len(example.context) + len(example.question) + most
        check_positions(model, length, type(model).__name__, f"{example.name}: the length with its answer,")


@dataclass(frozen=True)
class Answer:
    """A row, and what it is about.

    Attributes
    ----------
    row : Row
        With the score.
    example : str
        Name of the example.
    text : str
        What was generated, or the number of the option that was chosen.
    references : tuple of str
        What would have been right.
    """

    row: Row
    example: str
    text: str
    references: tuple[str, ...]


def answer(
    policies: Mapping[str, Policy | None],
    task: QuestionTask | ChoiceTask,
    ids: Sequence[int],
    *,
    model: PreTrainedModel,
    tokenizer: Any,
    budgets: Sequence[int],
    decoding: Decoding,
    seeds: Sequence[int] = (0,),
    split: str = "test",
    batch_size: int = 16,
) -> Iterator[list[Answer]]:
    """Run policies on examples of a task and yield answers as they come, one batch of examples after another.

    The full cache is run once for all budgets; without sampling, policies without noise are run once for all seeds.

    Parameters
    ----------
    policies : mapping of str to Policy or None
        Policies by the name they get in the rows; None is the full cache.
    task : QuestionTask or ChoiceTask
        Answers to questions are generated, of choices the likeliest is taken.
    ids : sequence of int
        Which of its examples.
    model, tokenizer
        A causal LM on kvenv's attention, and its tokenizer.
    budgets : sequence of int
        Each B.
    decoding : Decoding
        How the prompts are evicted from and answers are generated.
    seeds : sequence of int
        Seeds of noise and sampling.
    split : str
        What rows call the split.
    batch_size : int
        Examples decoded side by side. Questions that are held out are generated for one at a time.

    Yields
    ------
    list of Answer
        Of one batch, budget and policy (in that order), by example and seed.

    Raises
    ------
    ValueError
        If a policy needs the future, a prompt is empty or too long, or a number is impossible.
    FloatingPointError
        If the LLM's logits or a policy's priorities are NaN; the message names examples and layer.
    MemoryError
        If an example alone exceeds the memory. Where several do, a warning says that half as many are decoded side by
        side from then on.
    """
    check_cells(batch_size, policies=policies, budgets=budgets, seeds=seeds, examples=ids)
    for name, policy in policies.items():
        if policy is not None and not answerable(policy):
            raise ValueError(f"policy {name!r} knows the future, and answers have none before they are given")
        check_policy(policy, model)
    for budget in budgets:
        decoding.protection.check(budget)
    size = fits = decoding.side_by_side(task, batch_size)

    def parts_of(ids: Sequence[int], size: int) -> list[_Questions | _Choices]:
        parts = [ids[start : start + size] for start in range(0, len(ids), size)]
        return [_batch(task, part, model, tokenizer, decoding) for part in parts]

    def halves(part: _Questions | _Choices) -> list[_Questions | _Choices]:
        return parts_of(part.ids, -(-len(part.ids) // 2))

    for start in range(0, len(ids), size):
        parts = parts_of(ids[start : start + size], fits)
        for budget in budgets:
            for name, policy in policies.items():
                answers = partial(_Batch.answers, name=name, policy=policy, budget=budget, seeds=seeds, split=split)
                yield in_halves(parts, answers, halves)
        fits = min(fits, max(len(part.ids) for part in parts))


def answerable(policy: Policy) -> bool:
    """Return whether a policy can decide without knowing the future."""
    return not {"future", "expected_future"} & policy.needs


@dataclass(frozen=True)
class _Told:
    """What a policy said to an example: text, score, how many tokens; of questions whether they ran out, of choices
    the loss of the right one."""

    text: str
    score: float
    tokens: int
    truncated: bool | None = None
    loss: float | None = None


class _Batch(ABC, Generic[E]):
    """Some examples side by side, by their numbers."""

    def __init__(
        self, task: str, ids: Sequence[int], examples: Sequence[E], model: PreTrainedModel, decoding: Decoding
    ) -> None:
        self.task, self.ids, self.model, self.decoding = task, list(ids), model, decoding
        self.examples: Sequence[E] = examples
        self._full: list[list[_Told]] = []
        for example in examples:
            decoding.check(example, model)

    @abstractmethod
    def run(self, policy: Policy | None, budget: int, seed: int) -> list[_Told]:
        """Return what a policy says to each example."""

    @abstractmethod
    def references(self, example: E) -> tuple[str, ...]:
        """Return what would be right to say to an example."""

    def noisy(self, policy: Policy | None) -> bool:
        """Return whether seeds matter."""
        return policy is not None and "noise" in policy.needs

    def answers(
        self, *, name: str, policy: Policy | None, budget: int, seeds: Sequence[int], split: str
    ) -> list[Answer]:
        """Return the answers of the policy of that name, by example and seed."""
        if policy is None:
            self._full = self._full or self._runs(None, 0, seeds)
        runs = self._full if policy is None else self._runs(policy, budget, seeds)
        return [
            self.answer(index, told[index], name, policy is not None, budget, seed, split)
            for index in range(len(self.ids))
            for seed, told in zip(seeds, runs, strict=True)
        ]

    def _runs(self, policy: Policy | None, budget: int, seeds: Sequence[int]) -> list[list[_Told]]:
        """Return what a policy says to each example, by seed."""
        if self.noisy(policy):
            return [self.run(policy, budget, seed) for seed in seeds]
        return [self.run(policy, budget, seeds[0])] * len(seeds)

    def answer(self, index: int, told: _Told, name: str, evicts: bool, budget: int, seed: int, split: str) -> Answer:
        """Return what the policy of that name said to an example, and its row."""
        example, decoding = self.examples[index], self.decoding
        prompt = len(example.context) + len(example.question)
        length = prompt + max(told.tokens, 1)
        first = budget + decoding.interval if decoding.schedule == "periodic" else decoding.evicted_from(example)
        kept = kept_fraction(
            length, first if evicts else length, budget, decoding.interval, decoding.schedule, prompt - 1
        )
        row = Row(
            policy=name,
            traces=self.task,
            split=split,
            trace=self.ids[index],
            seed=seed,
            budget=budget,
            interval=decoding.interval,
            schedule=decoding.schedule,
            score_from=0,
            scored_answers=1,
            answer_loss=told.loss,
            kept_fraction=kept,
            score=told.score,
            generated_tokens=None if told.truncated is None else told.tokens,
            truncated=told.truncated,
        )
        return Answer(row, example.name, told.text, self.references(example))


class _Questions(_Batch[Question]):
    """Questions, whose answers are generated."""

    def __init__(self, score: Score, tokenizer: Any, *batch: Any) -> None:
        super().__init__(*batch)
        self.score, self.tokenizer = score, tokenizer

    def references(self, example: Question) -> tuple[str, ...]:
        return example.references

    def noisy(self, policy: Policy | None) -> bool:
        return self.decoding.temperature > 0 or super().noisy(policy)

    def run(self, policy: Policy | None, budget: int, seed: int) -> list[_Told]:
        cache = None
        if policy is not None:
            cache = EvictingCache(
                self.model,
                policy,
                budget=budget,
                interval=self.decoding.interval,
                schedule=self.decoding.schedule,
                protection=self.decoding.protection,
                seed=seed,
                rollouts=self.ids,
            )
        told, stops, finite = [], self._stops(), Finite()
        generated = self._generate(cache, seed, finite)
        names = [question.name for question in self.examples]
        check_run(getattr(policy, "name", FULL), names, finite.lost, None if cache is None else cache.unranked)
        for question, tokens in zip(self.examples, generated, strict=True):
            most = tokens[: question.max_new_tokens]
            said = list(itertools.takewhile(lambda token: token not in stops, most))
            text = self.tokenizer.decode(said, skip_special_tokens=True)
            told.append(
                _Told(text, self.score(text, question.references), len(said), len(said) == question.max_new_tokens)
            )
        return told

    @torch.no_grad()
    def _generate(self, cache: EvictingCache | None, seed: int, finite: Finite) -> list[list[int]]:
        """Return the tokens that follow each prompt, those after its end among them."""
        prompts = [question.context + question.question for question in self.examples]
        width, pad = max(map(len, prompts)), self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        decoding, most = self.decoding, max(question.max_new_tokens for question in self.examples)
        sampling = [Sampling(seed, self.ids, decoding.temperature, decoding.top_p)] if decoding.temperature > 0 else []
        with side_by_side(len(ids), width + most, "prompts with answers"), own_settings(self.model, pad):
            if cache is not None and decoding.held_out:
                self.model(input_ids=ids[:, : len(self.examples[0].context)], logits_to_keep=1, **{CACHE: cache})
            out = cast(Any, self.model.generate)(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=most,
                logits_processor=LogitsProcessorList([finite, *sampling]),
                **{CACHE: cache},
            )
        return out[:, width:].tolist()

    def _stops(self) -> set[int]:
        """Return the tokens that end an answer."""
        eos = self.model.generation_config.eos_token_id
        return set(eos) if isinstance(eos, list) else {eos}


class _Choices(_Batch[Choice]):
    """Choices, of which the likeliest option by its length is taken."""

    def references(self, example: Choice) -> tuple[str, ...]:
        return (str(example.answer),)

    def run(self, policy: Policy | None, budget: int, seed: int) -> list[_Told]:
        traces: list[Trace] = []
        numbers: list[int] = []
        for number, example in zip(self.ids, self.examples, strict=True):
            for option in example.options:
                tokens = np.array(example.context + example.question + option, dtype=np.int64)
                traces.append(Trace(tokens, self.decoding.evicted_from(example), (), example.name))
                numbers.append(number)
        if policy is None:
            losses = full_cache_losses(self.model, [trace.tokens for trace in traces])
            check_run(FULL, [trace.name for trace in traces], lost_rows(losses.nll, losses.entropy), None)
        else:
            losses = rollout(
                policy,
                traces,
                model=self.model,
                budget=budget,
                interval=self.decoding.interval,
                schedule=self.decoding.schedule,
                protection=self.decoding.protection,
                seed=seed,
                rollouts=numbers,
            ).losses
        nll = iter(losses.nll.double().cpu())
        return [self._choose(example, [next(nll) for _ in example.options]) for example in self.examples]

    @staticmethod
    def _choose(example: Choice, nll: Sequence[Tensor]) -> _Told:
        """Return the choice by the losses of each option's trace."""
        start = len(example.context) + len(example.question) - 1
        losses = [
            float(told[start : start + len(option)].sum()) for told, option in zip(nll, example.options, strict=True)
        ]
        chosen = min(range(len(losses)), key=lambda option: losses[option] / example.lengths[option])
        right = len(example.options[example.answer])
        return _Told(str(chosen), float(chosen == example.answer), right, loss=losses[example.answer] / right)


def _batch(
    task: QuestionTask | ChoiceTask, ids: Sequence[int], model: PreTrainedModel, tokenizer: Any, decoding: Decoding
) -> _Questions | _Choices:
    """Return examples of a task side by side."""
    if isinstance(task, QuestionTask):
        return _Questions(task.score, tokenizer, task.name, ids, [task.examples[i] for i in ids], model, decoding)
    return _Choices(task.name, ids, [task.examples[i] for i in ids], model, decoding)
