"""Answers under a budget against teacher-forced rollouts of the same text, and against the plain model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import agents
from kvenv.answering import Answer, Decoding, answer
from kvenv.layerwise import rollout
from kvenv.sampling import Sampling
from kvenv.state import Protection
from kvenv.tasks import Choice, ChoiceTask, Question, QuestionTask
from kvenv.traces import Trace
from tests.policies import kvenv_model, random_traces
from tests.reference import plain_losses

LENGTHS = (33, 40, 27)
PROTECTION = Protection(2, 3)


@pytest.fixture(autouse=True)
def _no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let answers get as long as they may."""
    monkeypatch.setattr(kvenv_model().generation_config, "eos_token_id", None)


class Words:
    """A tokenizer whose text is the ids themselves."""

    pad_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, ids))


def contains(text: str, references: tuple[str, ...]) -> float:
    return float(np.mean([reference in text.split() for reference in references]))


def prompts() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    tokens = [tuple(trace.tokens.tolist()) for trace in random_traces(LENGTHS)]
    return [(ids[:-7], ids[-7:]) for ids in tokens]


def questions(new: int = 9) -> QuestionTask:
    made = [
        Question(f"q/{number}", context, question, ("1", "2"), new + number)
        for number, (context, question) in enumerate(prompts())
    ]
    return QuestionTask("questions", "prefill", made, contains)


def choices() -> ChoiceTask:
    options = ((3, 4, 5), (6,), (7, 8))
    made = [
        Choice(f"c/{number}", context, question, options, number, (3, 1, 2))
        for number, (context, question) in enumerate(prompts())
    ]
    return ChoiceTask("choices", "prefill", made)


def decoding(schedule: str = "prefill", **options) -> Decoding:
    return Decoding(5, schedule, PROTECTION, **options)


def run(policies: list[str], task: QuestionTask | ChoiceTask, terms: Decoding, **options) -> list[Answer]:
    settings = {"model": kvenv_model(), "tokenizer": Words(), "budgets": (12,)} | options
    made = {name: None if name == "full" else agents.make(name) for name in policies}
    ids = range(len(task.examples))
    return [one for cell in answer(made, task, ids, decoding=terms, **settings) for one in cell]


HOW = [("prefill", False), ("prefill", True), ("periodic", False)]


@pytest.mark.parametrize(("schedule", "held_out"), HOW)
@pytest.mark.parametrize("name", ["h2o", "random", "knorm", "expected-attention"])
def test_answers_are_the_likeliest_tokens_of_the_rollout_of_the_same_text(
    schedule: str, held_out: bool, name: str
) -> None:
    task, terms = questions(), decoding(schedule, held_out=held_out)
    answers = run([name], task, terms)
    for number, (told, question) in enumerate(zip(answers, task.examples, strict=True)):
        said = [int(word) for word in told.text.split()]
        prompt = question.context + question.question
        evicted_from = len(question.context) if held_out else len(prompt)
        trace = Trace(np.array((*prompt, *said)), evicted_from, (), question.name)
        done = rollout(
            agents.make(name),
            [trace],
            model=kvenv_model(),
            budget=12,
            interval=5,
            schedule=schedule,
            protection=PROTECTION,
            rollouts=[number],
        )
        assert done.losses.correct[0, len(prompt) - 1 :].all()
        assert told.row.generated_tokens == len(said) == question.max_new_tokens
        assert told.row.truncated


def test_with_room_for_all_every_policy_says_what_the_plain_model_says() -> None:
    task = questions()
    names = [name for name in agents.names(trained=False) if not name.startswith("golden")]
    answers = run(["full", *names], task, decoding(), budgets=(80,))
    plain = kvenv_model()
    for question in task.examples:
        prompt = torch.tensor([question.context + question.question])
        out = plain.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
                             max_new_tokens=question.max_new_tokens)  # fmt: skip
        expected = " ".join(map(str, out[0, prompt.shape[1] :].tolist()))
        of_it = [told for told in answers if told.example == question.name]
        assert [told.text for told in of_it] == [expected] * (1 + len(names))
        assert {told.row.kept_fraction for told in of_it} == {1.0}


def test_the_full_cache_is_run_once_and_keeps_everything() -> None:
    answers = run(["full", "streaming"], questions(), decoding(), budgets=(12, 20))
    full = [told for told in answers if told.row.policy == "full"]
    assert [told.row.kept_fraction for told in full] == [1.0] * 6
    assert [told.text for told in full if told.row.budget == 12] == [
        told.text for told in full if told.row.budget == 20
    ]
    for told in answers:
        assert told.row.score == contains(told.text, ("1", "2"))
        if told.row.policy == "streaming":
            prompt, said = LENGTHS[told.row.trace], told.row.generated_tokens
            # The first answer token comes from the prompt as a whole, those after it from what was kept.
            kept = [1.0, *((told.row.budget + i) / (prompt + i) for i in range(1, said))]
            assert told.row.kept_fraction == pytest.approx(np.mean(kept))


@pytest.mark.parametrize("task", [questions(), choices()], ids=["questions", "choices"])
@pytest.mark.parametrize("schedule", ["prefill", "periodic"])
def test_answers_depend_neither_on_the_batch_nor_on_other_budgets(
    task: QuestionTask | ChoiceTask, schedule: str
) -> None:
    names = ["full", "random", "snapkv"]
    together = run(names, task, decoding(schedule), budgets=(12, 15))
    alone = [
        told for budget in (12, 15) for told in run(names, task, decoding(schedule), budgets=(budget,), batch_size=1)
    ]
    key = lambda told: (told.row.budget, told.row.policy, told.row.trace)  # noqa: E731
    for one, other in zip(sorted(together, key=key), sorted(alone, key=key), strict=True):
        assert (one.text, one.references) == (other.text, other.references)
        for field in dataclasses.fields(one.row):
            values = getattr(one.row, field.name), getattr(other.row, field.name)
            assert values[0] == (pytest.approx(values[1], abs=1e-9) if isinstance(values[1], float) else values[1])


def test_choices_of_the_full_cache_are_those_of_plain_losses() -> None:
    task = choices()
    for told, choice in zip(run(["full"], task, decoding()), task.examples, strict=True):
        prompt = choice.context + choice.question
        losses = [
            float(plain_losses(kvenv_model(), np.array(prompt + option))[len(prompt) - 1 :].sum())
            for option in choice.options
        ]
        normalised = [loss / length for loss, length in zip(losses, choice.lengths, strict=True)]
        assert int(told.text) == int(np.argmin(normalised))
        assert told.row.score == float(int(told.text) == choice.answer)
        assert told.row.answer_loss == pytest.approx(losses[choice.answer] / len(choice.options[choice.answer]))
        assert told.row.generated_tokens is told.row.truncated is None


def test_a_choice_whose_question_is_held_out_sees_the_evicted_context() -> None:
    held, whole = (run(["streaming"], choices(), decoding(held_out=out)) for out in (True, False))
    for one, other in zip(held, whole, strict=True):
        assert one.row.answer_loss != other.row.answer_loss
        assert one.row.kept_fraction < other.row.kept_fraction


def test_seeds_draw_noise_and_samples() -> None:
    sampled = decoding(temperature=1.5)
    answers = run(["full", "streaming"], questions(), sampled, seeds=(0, 1, 2))
    for name in ("full", "streaming"):
        texts = {(told.example, told.row.seed): told.text for told in answers if told.row.policy == name}
        assert len(set(texts.values())) == len(texts) == 9
    again = run(["full", "streaming"], questions(), sampled, seeds=(0, 1, 2))
    assert [told.text for told in again] == [told.text for told in answers]
    greedy = run(["random", "streaming"], questions(), decoding(), seeds=(0, 1, 2))
    assert len({told.text for told in greedy if told.row.policy == "streaming"}) == 3
    assert len({told.text for told in greedy if told.row.policy == "random"}) > 3


def test_samples_depend_neither_on_the_batch_nor_on_the_order() -> None:
    task, terms = questions(), decoding(temperature=1.0, top_p=0.9)
    together = {told.example: told.text for told in run(["full"], task, terms)}
    alone = {told.example: told.text for told in run(["full"], task, terms, batch_size=1)}
    turned = dataclasses.replace(task, examples=task.examples[:1])
    assert together == alone
    assert run(["full"], turned, terms)[0].text == together["q/0"]


def test_samples_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -3.0]])
    temperature, top_p, count = 0.7, 0.9, 4000
    scaled = torch.softmax(logits[0] / temperature, dim=0)
    kept = torch.tensor([False, True, True, False])  # the fewest likeliest tokens that make 0.9
    assert scaled[kept].sum() >= top_p > scaled[2]
    expected = torch.where(kept, scaled, 0.0) / scaled[kept].sum()
    sampler = Sampling(0, range(count), temperature, top_p)
    drawn = sampler(None, logits.expand(count, -1)).argmax(dim=1).bincount(minlength=4) / count
    torch.testing.assert_close(drawn, expected, atol=0.03, rtol=0)
    again = sampler(None, logits.expand(count, -1)).argmax(dim=1)
    assert (again != Sampling(0, range(count), temperature, top_p)(None, logits.expand(count, -1)).argmax(dim=1)).any()


@pytest.mark.parametrize("setting", [{"repetition_penalty": 5.0}, {"do_sample": True, "temperature": 9.0}])
def test_a_models_own_settings_change_no_answer(setting: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [told.text for told in run(["full", "streaming"], questions(), decoding())]
    own = kvenv_model().generation_config
    for name, value in setting.items():
        monkeypatch.setattr(own, name, value)
    assert [told.text for told in run(["full", "streaming"], questions(), decoding())] == expected
    assert kvenv_model().generation_config is own


@pytest.mark.parametrize(
    ("policies", "budgets", "message"),
    [(["full", "kvp-tiny"], (12,), "architecture"), (["full", "streaming"], (4,), "budget 4 is less than the 5")],
)
def test_what_cannot_be_is_refused_before_anything_is_generated(
    policies: list[str], budgets: tuple[int, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(kvenv_model()), "generate", lambda *args, **options: pytest.fail("it generated"))
    with pytest.raises(ValueError, match=message):
        run(policies, questions(), decoding(), budgets=budgets)


def test_one_token_options_are_told_before_anything_is_evicted() -> None:
    task = choices()
    short = [dataclasses.replace(one, options=((3,), (6,), (7,)), lengths=(1, 1, 1)) for one in task.examples]
    single = dataclasses.replace(task, examples=short)
    assert decoding().decided_before(single)
    losses = {told.row.answer_loss for told in run(["full", "streaming", "knorm"], single, decoding())}
    assert len({round(loss, 9) for loss in losses if loss is not None}) == len(task.examples)
    assert not decoding(held_out=True).decided_before(single)
    assert not decoding("periodic").decided_before(single)
    assert not decoding().decided_before(task)
    assert not decoding().decided_before(questions())


def test_sampling_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    run(["full"], questions(), decoding(temperature=1.0))
    assert torch.rand(1) == expected


def test_an_end_token_ends_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [told.text.split() for told in run(["full"], questions(), decoding())]
    stop = said[0][4]
    monkeypatch.setattr(kvenv_model().generation_config, "eos_token_id", int(stop))
    for before, told in zip(said, run(["full"], questions(), decoding()), strict=True):
        shorter = before[: before.index(stop)] if stop in before else before
        assert told.text.split() == shorter
        assert (told.row.generated_tokens, told.row.truncated) == (len(shorter), stop not in before)


@pytest.mark.parametrize("name", ["golden", "golden-expected"])
@pytest.mark.parametrize("task", [questions(), choices()], ids=["questions", "choices"])
def test_who_knows_the_future_is_refused(name: str, task: QuestionTask | ChoiceTask) -> None:
    with pytest.raises(ValueError, match=f"policy '{name}' knows the future"):
        run([name], task, decoding())


@pytest.mark.parametrize(
    ("change", "held_out", "message"),
    [
        ({"context": (), "question": ()}, False, "q/0: the prompt is empty"),
        ({"question": ()}, True, "q/0: the question is empty"),
        ({"max_new_tokens": 10**6}, False, "exceeds the .* positions"),
    ],
)
def test_impossible_examples_are_refused(change: dict, held_out: bool, message: str) -> None:
    task = questions()
    broken = dataclasses.replace(task.examples[0], **change)
    with pytest.raises(ValueError, match=message):
        run(["streaming"], dataclasses.replace(task, examples=[broken]), decoding(held_out=held_out))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "periodic", "held_out": True}, "held out of schedule 'prefill' only"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
    ],
)
def test_impossible_decoding_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoding(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"budgets": ()}, "budgets"), ({"seeds": (1, 1)}, "seeds .* nothing twice"), ({"batch_size": 0}, "batch_size 0")],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(["streaming"], questions(), decoding(), **options)
