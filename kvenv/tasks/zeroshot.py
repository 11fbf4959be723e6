"""Tasks that KVP evaluates without training for them (arXiv 2602.10238): choices, and LongBench.

BoolQ, ARC, HellaSwag and MMLU are those of lm-evaluation-harness without examples in the prompt: its prompts, its
choices, each with a space in front, on the split that it evaluates; no chat template, which it uses on request only.
KVP reports accuracy of all but HellaSwag, whose log-likelihoods are divided by the characters of the endings (the
harness's ``acc_norm``). BoolQ's question is held out, as in KVP; of the others only the last word or two of the prompt
could be. A prompt that is too long is cut from the left, as in the harness.

Files have the names of the tasks, such as ``boolq.jsonl``, and the fields of the data sets on the Hugging Face hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from kvenv.tasks import longbench
from kvenv.tasks.base import Choice, ChoiceTask, Task, TaskSetting
from kvenv.tasks.prompt import Framer
from kvenv.tasks.records import Record, Records, Source, strings


class _Prompt(NamedTuple):
    """The text of a choice."""

    context: str
    question: str
    options: Sequence[str]
    answer: int


class _DataSet(NamedTuple):
    """Where choices come from, what a record says, and whether the length of an option counts."""

    source: Source
    prompt: Callable[[Record], _Prompt]
    normalised: bool = False


def build(setting: TaskSetting) -> list[Task]:
    """Return the tasks; the records of each are read when its examples are first asked for.

    Raises
    ------
    ValueError
        If the setting's split is another than ``"test"``: what is published for evaluation is used for nothing else.
    """
    if setting.split != "test":
        raise ValueError(f"split={setting.split!r}: zeroshot has only what is published for evaluation, split='test'")
    return [*(_task(name, setting) for name in _DATA_SETS), *longbench.build(setting)]


def _task(name: str, setting: TaskSetting) -> ChoiceTask:
    """Return the task of that name."""
    data_set = _DATA_SETS[name]
    framer = Framer(setting.tokenizer, chat=False)
    choices = Records(data_set.source, setting).examples(partial(_choice, name, framer, setting.length))
    return ChoiceTask(f"zeroshot/{name}", "prefill", choices, held_out=name == "boolq")


def _choice(name: str, framer: Framer, length: int, number: int, record: Record) -> Choice:
    """Return the choice that a record poses."""
    data_set = _DATA_SETS[name]
    prompt = data_set.prompt(record)
    context, question = framer.frame(prompt.context, prompt.question)
    # Encoded behind the prompt, as in the harness: some tokenizers set a space in front of whatever stands alone.
    text = prompt.context + prompt.question
    before = len(framer.encode(text))
    options = tuple(framer.encode(f"{text} {option}")[before:] for option in prompt.options)
    excess = max(len(context) + len(question) + max(map(len, options)) - length, 0)
    if excess >= len(context):
        least = length + excess - len(context) + 1
        raise ValueError(f"length={length} is too short for zeroshot/{name}/{number}: give {least} or more")
    lengths = tuple(len(option) if data_set.normalised else 1 for option in prompt.options)
    return Choice(f"zeroshot/{name}/{number}", context[excess:], question, options, prompt.answer, lengths)


def _boolq(record: Record) -> _Prompt:
    """Return a passage and a question to be answered by yes or no."""
    question = f"\nQuestion: {record['question']}?\nAnswer:"
    return _Prompt(record["passage"], question, ("no", "yes"), _position(record, "answer", ("False", "True")))


def _arc(record: Record) -> _Prompt:
    """Return a question of a science exam; its options are labelled by letters or digits."""
    options, labels = strings(record["choices"], "text"), strings(record["choices"], "label")
    if len(options) != len(labels):
        raise TypeError(f"{len(options)} options with {len(labels)} labels")
    return _Prompt(f"Question: {record['question']}", "\nAnswer:", options, _position(record, "answerKey", labels))


def _hellaswag(record: Record) -> _Prompt:
    """Return the beginning of a description and its endings."""
    text = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    context, space, last = _without_marks(text).rpartition(" ")
    endings = [_without_marks(ending) for ending in _four(record, "endings")]
    return _Prompt(context, space + last, endings, _position(record, "label", ("0", "1", "2", "3")))


def _without_marks(text: str) -> str:
    """Return a text of HellaSwag without WikiHow's marks, as the harness removes them."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _mmlu(record: Record) -> _Prompt:
    """Return an exam question with its four options, which are chosen by letter."""
    subject = record["subject"].replace("_", " ")
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", _four(record, "choices"))]
    context = "\n".join((record["question"].strip(), *lines))
    return _Prompt(
        f"The following are multiple choice questions (with answers) about {subject}.\n\n{context}",
        "\nAnswer:",
        "ABCD",
        _position(record, "answer", ("0", "1", "2", "3")),
    )


def _four(record: Record, field: str) -> tuple[str, ...]:
    """Return a field that is a list of four strings."""
    options = strings(record, field)
    if len(options) != 4:
        raise TypeError(f"{field} must be four, not {len(options)}")
    return options


def _position(record: Record, field: str, values: Sequence[str]) -> int:
    """Return where the value of a field stands among those that are possible."""
    value = str(record[field])
    if value not in values:
        raise LookupError(f"{field} {value} is none of {', '.join(values)}")
    return values.index(value)


_ARC = ("question", "choices", "answerKey")
_DATA_SETS = {
    "boolq": _DataSet(
        Source("boolq.jsonl", "google/boolq", ("passage", "question", "answer"), split="validation"), _boolq
    ),
    "arc_challenge": _DataSet(Source("arc_challenge.jsonl", "allenai/ai2_arc", _ARC, "ARC-Challenge"), _arc),
    "arc_easy": _DataSet(Source("arc_easy.jsonl", "allenai/ai2_arc", _ARC, "ARC-Easy"), _arc),
    "hellaswag": _DataSet(
        Source(
            "hellaswag.jsonl",
            "Rowan/hellaswag",
            ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
            split="validation",
        ),
        _hellaswag,
        normalised=True,
    ),
    "mmlu": _DataSet(
        Source("mmlu.jsonl", "cais/mmlu", ("subject", "question", "choices", "answer"), config="all"), _mmlu
    ),
}
