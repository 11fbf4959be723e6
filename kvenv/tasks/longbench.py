"""LongBench's English tasks (Bai et al., ACL 2024, arXiv 2308.14508), as THUDM/LongBench on GitHub runs them.

Prompts, lengths of answers, chat templates and scores are those of ``dataset2prompt.json``, ``dataset2maxlen.json``,
``pred.py``, ``metrics.py`` and ``eval.py``. What differs:

- A prompt is cut in the middle after it was encoded, its chat template included, so that it fits the setting's length
  together with the answer; ``pred.py`` cuts its text to a length of each model's own.
- Context and question are encoded each for itself: a question may be held out.
- Generation doesn't stop at a newline in samsum, of which the first line alone is scored either way.

The Chinese tasks (multifieldqa_zh, dureader, vcsum, lsht, passage_retrieval_zh) are left out: they are scored on words
that a segmenter finds.

Files are LongBench's own, such as ``qasper.jsonl``. Without a directory of them, they come from the archive in
LongBench's repository: its loading script isn't run by ``datasets`` any more, and mirrors in other formats, such as
kvpress's, have the prompts filled in already.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import partial

from huggingface_hub import hf_hub_download

from kvenv.tasks.base import Question, QuestionTask, TaskSetting
from kvenv.tasks.longbench_scores import (
    Metric,
    best,
    classification,
    code_similarity,
    count,
    f1,
    load_rouge,
    retrieval,
    rouge_l,
)
from kvenv.tasks.prompt import Framer
from kvenv.tasks.records import Record, Records, Source, parse, strings

_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
_UNANSWERABLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
PROMPTS = {
    # "asconcisely": what papers' figures were measured with; LongBench corrected it later.
    "narrativeqa": "You are given a story, which can be either a novel or a movie script, and a question. Answer the "
    "question asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
    "Story: {context}\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if "
    "possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
    "qasper": f"You are given a scientific article and a question. Answer the question {_UNANSWERABLE}"
    f"Article: {{context}}\n\n Answer the question based on the above article {_UNANSWERABLE}"
    "Question: {input}\n\nAnswer:",
    "multifieldqa_en": "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question "
    "based on the above text, only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:",
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "gov_report": "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
    "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    "qmsum": "You are given a meeting transcript and a query containing a question or instruction. Answer the query in "
    "one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
    "in one or more sentences.\n\nQuery: {input}\nAnswer:",
    "multi_news": "You are given several news passages. Write a one-page summary of all news. \n\n"
    "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
    "trec": "Please determine the type of the question below. Here are some examples of questions.\n\n"
    "{context}\n{input}",
    "triviaqa": "Answer the question based on the given passage. Only give me the answer and do not output any other "
    "words. The following are some examples.\n\n{context}\n\n{input}",
    "samsum": "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
    "{context}\n\n{input}",
    "passage_count": "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please "
    "carefully read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In "
    "other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count "
    "of unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, "
    "3, and so on.\n\nThe final answer is: ",
    "passage_retrieval_en": "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which "
    "paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the "
    'number of the paragraph that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", '
    "etc.\n\nThe answer is: ",
    "lcc": "Please complete the code given below. \n{context}Next line of code:\n",
    "repobench-p": "Please complete the code given below. \n{context}{input}Next line of code:\n",
}
"""What stands around context and input of each task, character by character as published."""

MAX_NEW_TOKENS = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
    "gov_report": 512,
    "qmsum": 512,
    "multi_news": 512,
    "trec": 64,
    "triviaqa": 32,
    "samsum": 128,
    "passage_count": 32,
    "passage_retrieval_en": 32,
    "lcc": 64,
    "repobench-p": 64,
}
"""How many tokens each task generates at most."""

_METRICS: dict[str, Metric] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), f1),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    "passage_count": count,
    "passage_retrieval_en": retrieval,
    **dict.fromkeys(("lcc", "repobench-p"), code_similarity),
}
_FIRST_LINE = ("trec", "triviaqa", "samsum")
_WITHOUT_CHAT = (*_FIRST_LINE, "lcc", "repobench-p")


@dataclass(frozen=True)
class _Archive(Source):
    """A file of the archive in LongBench's repository."""

    def download(self) -> list[Record]:
        """Return the file's records."""
        try:
            with zipfile.ZipFile(hf_hub_download(self.hub, "data.zip", repo_type="dataset")) as archive:
                text = archive.read(f"data/{self.file}").decode("utf-8")
        except Exception as error:  # of the hub, the network, the archive; all of them mean that it can't be had
            raise self.unavailable(error) from error
        return parse(text, f"{self.hub}/{self.file}")


def build(setting: TaskSetting) -> list[QuestionTask]:
    """Return the 16 tasks; the records of each are read when its questions are first asked for."""
    return [_task(name, setting) for name in PROMPTS]


def _task(name: str, setting: TaskSetting) -> QuestionTask:
    """Return the task of that name."""
    fields = ("context", "input", "answers", *(("all_classes",) if name == "trec" else ()))
    records = Records(_Archive(f"{name}.jsonl", "zai-org/LongBench", fields), setting)
    metric = partial(_class_of, records) if name == "trec" else _METRICS[name]
    framer = Framer(setting.tokenizer, setting.chat and name not in _WITHOUT_CHAT)
    questions = records.examples(partial(_question, name, framer, setting.length))
    score = best(metric, first_line=name in _FIRST_LINE)
    # Of LongBench KVP reports gov_report, whose question it holds out.
    return QuestionTask(f"zeroshot/{name}", "prefill", questions, score, held_out=name == "gov_report")


def _class_of(records: Records, text: str, reference: str) -> float:
    """Return the score of a class among those of the data set, which every record lists."""
    return classification(text, reference, strings(records.taken[0][1], "all_classes"))


def _question(name: str, framer: Framer, length: int, number: int, record: Record) -> Question:
    """Return the question that a record asks."""
    if _METRICS.get(name) is rouge_l:
        load_rouge()  # so that a missing package shows before anything is generated
    before, after = PROMPTS[name].split("{context}")
    context, question = framer.frame(before + record["context"], after.replace("{input}", record["input"]))
    room = length - MAX_NEW_TOKENS[name]
    if room < 2:
        raise ValueError(f"length={length} leaves no prompt to zeroshot/{name}, which generates {MAX_NEW_TOKENS[name]}")
    context, question = cut_middle(context, question, room)
    return Question(f"zeroshot/{name}/{number}", context, question, strings(record, "answers"), MAX_NEW_TOKENS[name])


def cut_middle(
    context: tuple[int, ...], question: tuple[int, ...], room: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a prompt of at most ``room`` tokens: a longer one without its middle, as in ``pred.py``."""
    total = len(context) + len(question)
    if total <= room:
        return context, question
    start, stop = room // 2, total - room // 2
    border = len(context)
    return context[:start] + context[stop:], question[: max(start - border, 0)] + question[max(stop - border, 0) :]
