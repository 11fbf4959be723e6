"""RULER's question answering among other documents: ``scripts/data/synthetic/qa.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np

from kvenv.tasks.records import Record, Source, check_fields
from kvenv.tasks.ruler.recipe import Prompt, Recipe
from kvenv.tasks.scoring import string_match_part
from kvenv.traces import SPLITS

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class Asked:
    """A question of a data set.

    Attributes
    ----------
    text : str
        The question.
    answers : tuple of str
        Right answers.
    documents : tuple of str
        What it is asked of.
    related : tuple of str
        Documents about the same thing, which are added before others are.
    """

    text: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    related: tuple[str, ...] = ()


def squad(records: list[Record]) -> list[Asked]:
    """Return SQuAD's questions that have an answer, from its JSON file or from the hub's records."""
    if "data" in records[0]:
        records = [record for article in records[0]["data"] for record in _hub_form(article)]
    for number, record in enumerate(records, start=1):
        check_fields(record, ("title", "context", "question", "answers"), f"SQuAD:{number}")
    articles: dict[str, dict[str, None]] = {}
    for record in records:
        articles.setdefault(record["title"], {})[record["context"]] = None
    return [
        Asked(
            record["question"],
            tuple(record["answers"]["text"]),
            (record["context"],),
            tuple(paragraph for paragraph in articles[record["title"]] if paragraph != record["context"]),
        )
        for record in records
        if record["answers"]["text"]
    ]


def _hub_form(article: Record) -> list[Record]:
    """Return the records that the hub makes of an article of SQuAD's JSON file."""
    check_fields(article, ("title", "paragraphs"), "an article of SQuAD")
    return [
        {
            "title": article["title"],
            "context": paragraph["context"],
            "question": asked["question"],
            "answers": {"text": [answer["text"] for answer in asked["answers"]]},
        }
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]


def hotpotqa(records: list[Record]) -> list[Asked]:
    """Return HotpotQA's questions, from its JSON file or from the hub's records."""
    questions = []
    for number, record in enumerate(records, start=1):
        check_fields(record, ("question", "answer", "context"), f"HotpotQA:{number}")
        context = record["context"]
        titled = zip(context["title"], context["sentences"]) if isinstance(context, dict) else context
        documents = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in titled)
        questions.append(Asked(record["question"], (record["answer"],), documents))
    return questions


SQUAD = Source("squad.json", "rajpurkar/squad_v2", fields=(), split="validation")
HOTPOTQA = Source("hotpotqa.json", "hotpotqa/hotpot_qa", fields=(), config="distractor", split="validation")


@dataclass(frozen=True)
class Documents(Recipe):
    """A question is to be answered among documents; the size is in characters of those that are added.

    Attributes
    ----------
    source : Source
        The data set; its file serves if it is in ``data``, else the ``datasets`` package.
    parse : callable
        Makes questions of its records.
    data : Path or None
        Directory of files.
    split : str
        Whose questions are asked: they are dealt to the splits in turn.
    """

    source: Source
    parse: Callable[[list[Record]], list[Asked]]
    data: Path | None
    split: str

    max_new_tokens = 32
    score = staticmethod(string_match_part)
    least = 0

    @property
    def most(self) -> int:
        return sum(map(len, self._documents))

    @property
    def missing(self) -> str:
        if self._directory or find_spec("datasets"):
            return ""
        return (
            f"{self.source.file} in the directory of the data (--task-data), as RULER's scripts/data/synthetic/json/"
            "download_qa_dataset.sh names it, or the package datasets (pip install 'kvenv[tasks]')"
        )

    def count(self, asked: int) -> int:
        return min(asked, len(self._questions))

    def draw(self, rng: np.random.Generator, number: int, size: int) -> Prompt:
        """Return a prompt with a question's documents and others of up to ``size`` characters."""
        asked = self._questions[number]
        chosen, related = list(asked.documents), list(asked.related)
        rng.shuffle(related)
        known, total = {*chosen, *related}, 0
        others = (self._documents[i] for i in rng.permutation(len(self._documents)))
        for document in chain(related, (document for document in others if document not in known)):
            total += len(document)
            if total > size:
                break
            chosen.append(document)
        rng.shuffle(chosen)
        listed = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(chosen, start=1))
        return Prompt(
            f"{INSTRUCTION}\n\nThe following are given documents.\n\n{listed}",
            f"\n\n{INSTRUCTION}\n\nQuestion: {asked.text}",
            " Answer:",
            asked.answers,
        )

    @property
    def _directory(self) -> Path | None:
        """The directory, if it holds the file."""
        return self.data if self.data is not None and (self.data / self.source.file).is_file() else None

    @cached_property
    def _all_questions(self) -> list[Asked]:
        return self.parse(self.source.read(self._directory))

    @cached_property
    def _questions(self) -> list[Asked]:
        """Questions of the split."""
        return self._all_questions[SPLITS.index(self.split) :: len(SPLITS)]

    @cached_property
    def _documents(self) -> list[str]:
        """Documents of all questions, each once."""
        return sorted({text for asked in self._all_questions for text in (*asked.documents, *asked.related)})
