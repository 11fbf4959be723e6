r"""Reasoning under periodic eviction: AIME 2024, AIME 2025 and GPQA diamond (ForesightKV, arXiv:2602.03203).

The prompt is that of ForesightKV's published evaluators, the same for all three, thinking on where the chat template
knows it. ``length`` is prompt and answer together (theirs: 16,384 for AIME, 32,768 for GPQA). They sample 32 answers at
temperature 0.6; how often and how to sample is up to who generates.

Locally ``aime24.jsonl`` and ``aime25.jsonl`` hold ``problem`` or ``question`` and ``answer`` a line, ``gpqa.jsonl`` a
problem with its options in it and the right letter (``input`` and ``output``, or as AIME's) or the columns of the data
set on the hub, whose options are put into an order that depends on the question alone.

Graded is the last ``\boxed{}``, numbers by math-verify; see :mod:`kvenv.tasks.grading`. ForesightKV's evaluators take
the last number of a text without a box; here that is no answer. A letter may also be stated ("Answer: C").
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from kvenv.tasks.base import Examples, Question, QuestionTask, TaskSetting
from kvenv.tasks.grading import parse, same_letter, same_number
from kvenv.tasks.prompt import Framer
from kvenv.tasks.records import Record, Source, check_fields
from kvenv.traces.draw import Draw

PROMPT = "Please solve the following problem step by step and put the final answer within \\boxed{}.\n"
SOURCES = {
    "aime24": Source("aime24.jsonl", "HuggingFaceH4/aime_2024", (), split="train"),
    "aime25": Source("aime25.jsonl", "math-ai/aime25", (), split="test"),
    "gpqa": Source("gpqa.jsonl", "Idavidrein/gpqa", (), "gpqa_diamond", "train"),
}
GPQA_COLUMNS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

Posed = tuple[str, str]
"""Problem and right answer."""


def build(setting: TaskSetting) -> list[QuestionTask]:
    """Return the tasks; their data are read when their questions are asked for."""
    return [
        QuestionTask(
            f"reasoning/{name}",
            "periodic",
            examples=_questions(name, _letter_problem if name == "gpqa" else _number_problem, setting),
            score=same_letter if name == "gpqa" else same_number,
        )
        for name in SOURCES
    ]


def _questions(name: str, pose: Callable[[Record, str], Posed], setting: TaskSetting) -> Examples[Question]:
    """Return the questions of a task."""
    framer = Framer(setting.tokenizer, setting.chat)

    @cache
    def posed() -> list[Posed]:
        source = SOURCES[name]
        place = str(setting.data / source.file) if setting.data else source.hub
        records = source.read(setting.data)
        return [pose(record, f"{place}:{number}") for number, record in enumerate(records, start=1)]

    def make(i: int) -> Question:
        problem, answer = posed()[i]
        context, question = framer.frame(PROMPT, problem, thinking=True)
        left = setting.length - len(context) - len(question)
        if left < 1:
            raise ValueError(
                f"length={setting.length} leaves no room to answer reasoning/{name}/{i}: its prompt has "
                f"{len(context) + len(question)} tokens"
            )
        return Question(f"reasoning/{name}/{i}", context, question, (answer,), left)

    return Examples(lambda: min(len(posed()), setting.num_examples), make)


def _number_problem(record: Record, place: str) -> Posed:
    """Return problem and number of a record of AIME."""
    problem, answer = _field(record, place, "problem", "question"), _field(record, place, "answer")
    if not any(getattr(found, "is_number", False) for found in parse(answer)):
        raise ValueError(f"{place}: the answer must be a number, not {answer!r}")
    return problem, answer


def _letter_problem(record: Record, place: str) -> Posed:
    """Return problem, options included, and letter of a record of GPQA."""
    if "Correct Answer" in record:
        return _with_options(record, place)
    problem, letter = _field(record, place, "input", "problem", "question"), _field(record, place, "output", "answer")
    if not re.fullmatch("[A-E]", letter):
        raise ValueError(f"{place}: the answer must be an option's letter, A to E, not {letter!r}")
    return problem, letter


def _with_options(record: Record, place: str) -> Posed:
    """Return problem and letter of a record that has question and answers apart."""
    check_fields(record, GPQA_COLUMNS, place)
    question, right, *wrong = (str(record[column]).strip() for column in GPQA_COLUMNS)
    options = Draw("gpqa", question).some([right, *wrong], 4)
    lines = [f"{letter}) {option}" for letter, option in zip("ABCD", options)]
    return f"{question}\n\n" + "\n".join(lines), "ABCD"[options.index(right)]


def _field(record: Record, place: str, *names: str) -> str:
    """Return the first of the fields that a record has, as text."""
    for name in names:
        if record.get(name) is not None and str(record[name]).strip():
            return str(record[name]).strip()
    raise ValueError(f"{place}: lacks {' or '.join(names)}; it has {', '.join(map(str, record)) or 'nothing'}")
