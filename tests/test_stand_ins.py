"""Stand-ins for the benchmarks: chosen by the tokenizer, exact parts of traces, answered by the bundled LLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import agents
import kvenv
from kvenv.models import LoadedModel
from kvenv.tasks import TASKS, Choice, ChoiceTask, Question, QuestionTask, TaskSetting, TraceTask, load_tasks
from kvenv.tasks.scoring import string_match_all
from kvenv.tasks.stand_ins import first_word, spells_text
from kvenv.traces.words import WORDS
from tests.test_task_texts import tokenizer

NAMES = {
    "ruler": ["ruler/recall", "ruler/tracking"],
    "perplexity": ["perplexity/dialogue", "perplexity/recall"],
    "reasoning": ["reasoning/reasoning"],
    "zeroshot": ["zeroshot/dialogue"],
    "entropy": ["entropy/recall", "entropy/tracking", "entropy/dialogue", "entropy/reasoning"],
}
SCHEDULES = {"reasoning": "periodic", "entropy": "periodic"}  # all others: prefill
QUESTIONS = {"ruler/recall": "recall", "ruler/tracking": "tracking", "reasoning/reasoning": "reasoning"}


def setting(**changes: object) -> TaskSetting:
    known = {"tokenizer": kvenv.load_model("tiny").tokenizer, "length": 512, "num_examples": 8}
    return TaskSetting(**{**known, **changes})  # type: ignore[arg-type]


def test_which_tokenizers_spell_text(tiny_model: LoadedModel) -> None:
    assert not spells_text(tiny_model.tokenizer)
    assert spells_text(tokenizer())


@pytest.mark.parametrize("benchmark", TASKS)
def test_the_bundled_llm_gets_stand_ins_of_the_same_kinds(benchmark: str) -> None:
    tasks = load_tasks(benchmark, setting())
    assert [task.name for task in tasks] == NAMES[benchmark]
    assert {task.schedule for task in tasks} == {SCHEDULES.get(benchmark, "prefill")}
    for task in tasks:
        family = task.name.split("/")[1]
        assert task.note.startswith(f"a stand-in: traces of {family} instead of {benchmark}'s own text")
        assert [one.name for one in load_tasks(task.name, setting())] == [task.name]
    with pytest.raises(ValueError, match=f"unknown task '{benchmark}/vt': {benchmark} has {NAMES[benchmark][0]}"):
        load_tasks(f"{benchmark}/vt", setting())


def questions(name: str, **changes: object) -> QuestionTask:
    (task,) = load_tasks(name, setting(**changes))
    assert isinstance(task, QuestionTask)
    return task


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_question_is_the_sentence_with_a_traces_last_answer(name: str, split: str, tiny_model: LoadedModel) -> None:
    task = questions(name, split=split)
    source = kvenv.load_traces(QUESTIONS[name], split=split, tokenizer=tiny_model.tokenizer)
    assert len(task.examples) == 8
    for number, question in enumerate(task.examples):
        trace = source[number]
        begin, end = [span for span in trace.answers if span[1] <= 510][-1]
        assert question.name == f"{name}/{number}"
        assert question.context + question.question == tuple(trace.tokens[:begin])
        assert question.references == (tiny_model.tokenizer.decode(trace.tokens[begin:end]),)
        assert question.references[0] in WORDS[split]
        assert begin + question.max_new_tokens <= 512
        # The context ends where a sentence does, and the question holds no other end.
        assert tiny_model.tokenizer.decode(question.context).endswith(".")
        assert " . " not in tiny_model.tokenizer.decode(question.question)
        assert 0 < len(question.question) < 16


def choices(**changes: object) -> ChoiceTask:
    (task,) = load_tasks("zeroshot", setting(**changes))
    assert isinstance(task, ChoiceTask)
    return task


def test_a_choice_is_among_values_that_were_told(tiny_model: LoadedModel) -> None:
    source = kvenv.load_traces("dialogue", split="test", tokenizer=tiny_model.tokenizer)
    for number, choice in enumerate(choices().examples):
        before = tiny_model.tokenizer.decode(choice.context).split()
        options = [tiny_model.tokenizer.decode(option) for option in choice.options]
        assert len(set(options)) == 4
        assert all(option in before and option in WORDS["test"] for option in options)
        start = len(choice.context + choice.question)
        assert tuple(source[number].tokens[start : start + 2]) == choice.options[choice.answer]
        assert choice.lengths == (1, 1, 1, 1)
    assert len({choice.answer for choice in choices().examples}) > 1


def test_traces_are_those_of_the_families(tiny_model: LoadedModel) -> None:
    for benchmark, schedule in (("perplexity", "prefill"), ("entropy", "periodic")):
        for task in load_tasks(benchmark, setting(length=300, split="validation")):
            assert isinstance(task, TraceTask)
            assert task.entropy == (benchmark == "entropy")
            source = kvenv.load_traces(
                task.name.split("/")[1],
                split="validation",
                tokenizer=tiny_model.tokenizer,
                trace_length=300,
                schedule=schedule,
            )
            assert np.array_equal(task.source[3].tokens, source[3].tokens)
            assert task.source[3].prompt_length == source[3].prompt_length


def answer(question: Question, loaded: LoadedModel, policy: str | None = None) -> str:
    """Return what the LLM generates, with the full cache or under a budget of 32 pairs."""
    cache = None
    if policy is not None:
        cache = kvenv.EvictingCache(loaded.model, agents.make(policy), budget=32, interval=16, seed=1)
    prompt = torch.tensor([question.context + question.question])
    done = loaded.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=question.max_new_tokens,
        do_sample=False,
    )
    return str(loaded.tokenizer.decode(done[0, prompt.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_bundled_llm_answers_with_its_full_cache_and_not_without(name: str, tiny_model: LoadedModel) -> None:
    task = questions(name, length=320, num_examples=5)
    full = [task.score(answer(question, tiny_model), question.references) for question in task.examples]
    evicted = [task.score(answer(question, tiny_model, "random"), question.references) for question in task.examples]
    assert np.mean(full) >= 0.8
    assert np.mean(evicted) <= np.mean(full) - 0.25


@torch.no_grad()
def log_likelihoods(choice: Choice, loaded: LoadedModel) -> torch.Tensor:
    """Return the log-likelihood of each option, which are of the same length here."""
    options = torch.tensor(choice.options)
    prompt = torch.tensor(choice.context + choice.question).expand(len(options), -1)
    logits = loaded.model(torch.cat([prompt, options], dim=1)).logits[:, prompt.shape[1] - 1 : -1]
    return logits.log_softmax(dim=-1).gather(-1, options[..., None]).sum(dim=(1, 2))


def test_the_bundled_llm_chooses_right_with_its_full_cache(tiny_model: LoadedModel) -> None:
    task = choices(num_examples=5)
    right = [int(log_likelihoods(choice, tiny_model).argmax()) == choice.answer for choice in task.examples]
    assert np.mean(right) >= 0.8


@pytest.mark.parametrize("name", [*QUESTIONS, "zeroshot/dialogue"])
def test_traces_too_short_for_a_question(name: str) -> None:
    (task,) = load_tasks(name, setting(length=24))
    with pytest.raises(ValueError, match=r"length=24 is too short for a (question|choice) of \w+: choose 512"):
        task.examples[0]


@pytest.mark.parametrize(
    ("prediction", "contained", "first"),
    [("kalo . the", 1, 1), ("KALO .", 1, 0), ("the kalo", 1, 0), ("kal o", 0, 0), ("mive", 0, 0), ("", 0, 0)],
)
def test_scores(prediction: str, contained: float, first: float) -> None:
    assert string_match_all(prediction, ("kalo",)) == contained
    assert first_word(prediction, ("kalo",)) == first
    assert string_match_all("kalo and so on", ("kalo", "mive")) == 0.5
