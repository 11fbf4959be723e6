"""LongBench and the choices of KVP's evaluation: published prompts, scores against plain references, clear errors."""

from __future__ import annotations

import json
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvenv.tasks import Choice, ChoiceTask, Question, QuestionTask, Task, TaskSetting, load_tasks, longbench, zeroshot
from kvenv.tasks.longbench import cut_middle
from kvenv.tasks.longbench_scores import (
    best,
    classification,
    code_similarity,
    count,
    f1,
    load_rouge,
    retrieval,
    rouge_l,
)

CHAT = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"

# LongBench's config/dataset2prompt.json, its Chinese tasks left out.
PUBLISHED = json.loads(r"""{
    "narrativeqa": "You are given a story, which can be either a novel or a movie script, and a question. Answer the question asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {context}\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
    "qasper": "You are given a scientific article and a question. Answer the question as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the information in the article, write \"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.\n\nArticle: {context}\n\n Answer the question based on the above article as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the information in the article, write \"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
    "multifieldqa_en": "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    "hotpotqa": "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    "2wikimqa": "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    "musique": "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    "gov_report": "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    "qmsum": "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\nAnswer:",
    "multi_news": "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
    "trec": "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
    "triviaqa": "Answer the question based on the given passage. Only give me the answer and do not output any other words. The following are some examples.\n\n{context}\n\n{input}",
    "samsum": "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
    "passage_count": "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
    "passage_retrieval_en": "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is from. The answer format must be like \"Paragraph 1\", \"Paragraph 2\", etc.\n\nThe answer is: ",
    "lcc": "Please complete the code given below. \n{context}Next line of code:\n",
    "repobench-p": "Please complete the code given below. \n{context}{input}Next line of code:\n"
}""")  # noqa: E501
MOST = dict(zip(PUBLISHED, (128, 128, 64, 32, 32, 32, 512, 512, 512, 64, 32, 128, 32, 32, 64, 64)))
WITHOUT_CHAT = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
longbench_tasks = pytest.mark.parametrize("name", PUBLISHED)

RECORDS: dict[str, dict[str, Any]] = {
    "boolq": {"passage": "Snow is white.", "question": "is snow white", "answer": True, "title": "Snow"},
    "arc_challenge": {
        "id": "x",
        "question": "What melts?",
        "choices": {"text": ["rock", "ice", "air"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "arc_easy": {
        "question": "What is wet?",
        "choices": {"text": ["sand", "water"], "label": ["1", "2"]},
        "answerKey": "1",
    },
    "hellaswag": {
        "activity_label": "Making tea",
        "ctx_a": "[header] Boil [title] Fill the kettle.",
        "ctx_b": "she",
        "endings": ["drinks [step] it.", "flies.", "[substeps] sleeps.", "runs  off."],
        "label": "0",
    },
    "mmlu": {"subject": "high_school_geography", "question": " Where? ", "choices": list("wxyz"), "answer": 3},
}
PROMPTS = {  # context, question, options, answer, lengths
    "boolq": ("Snow is white.", "\nQuestion: is snow white?\nAnswer:", [" no", " yes"], 1, (1, 1)),
    "arc_challenge": ("Question: What melts?", "\nAnswer:", [" rock", " ice", " air"], 1, (1, 1, 1)),
    "arc_easy": ("Question: What is wet?", "\nAnswer:", [" sand", " water"], 0, (1, 1)),
    "hellaswag": (
        "Making tea: Boil. Fill the kettle.",
        " She",
        [" drinks it.", " flies.", "  sleeps.", " runs off."],
        0,
        (10, 6, 8, 9),
    ),
    "mmlu": (
        "The following are multiple choice questions (with answers) about high school geography.\n\n"
        "Where?\nA. w\nB. x\nC. y\nD. z",
        "\nAnswer:",
        [" A", " B", " C", " D"],
        3,
        (1, 1, 1, 1),
    ),
}
choice_tasks = pytest.mark.parametrize("name", PROMPTS)


@cache
def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Return a small byte-level BPE tokenizer with a BOS token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(PUBLISHED.values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", chat_template=CHAT if chat else None)


def record(name: str, **changes: Any) -> dict[str, Any]:
    """Return a record of LongBench."""
    of_class = {"trec": ["Food", "City"]}
    common = {"context": "Some {text}.\nMore.", "input": "Which {x}?", "answers": ["Paragraph 3", "b"]}
    return {**common, "all_classes": of_class.get(name), "length": 3, "_id": "1", **changes}


def write(directory: Path, name: str, *records: object) -> Path:
    """Write the file of a task and return its directory."""
    lines = (line if isinstance(line, str) else json.dumps(line) for line in records)
    (directory / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return directory


def load(name: str, data: Path | None, *, chat: bool = False, **setting: Any) -> Task:
    """Return one task."""
    (task,) = load_tasks(f"zeroshot/{name}", TaskSetting(tokenizer(chat), data=data, **setting))
    return task


def questions(name: str, data: Path | None, **setting: Any) -> list[Question]:
    """Return the questions of a task."""
    task = load(name, data, **setting)
    assert isinstance(task, QuestionTask)
    return list(task.examples)


def choices(name: str, data: Path | None, **setting: Any) -> list[Choice]:
    """Return the choices of a task."""
    task = load(name, data, **setting)
    assert isinstance(task, ChoiceTask)
    return list(task.examples)


# Choices


@choice_tasks
def test_choices_are_asked_as_by_the_harness(name: str, tmp_path: Path) -> None:
    context, question, options, answer, lengths = PROMPTS[name]
    (choice,) = choices(name, write(tmp_path, name, RECORDS[name]), chat=True)
    assert choice.context[0] == tokenizer().bos_token_id
    assert tokenizer().decode(choice.context[1:]) == context
    assert tokenizer().decode(choice.question) == question
    assert [tokenizer().decode(option) for option in choice.options] == options
    assert (choice.name, choice.answer, choice.lengths) == (f"zeroshot/{name}/0", answer, lengths)


def test_options_are_encoded_behind_the_prompt(tmp_path: Path) -> None:
    # As Llama 2's does, this one sets a space in front of every text.
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "▁no": 1, "▁yes": 2, "▁": 3}, unk_token="[UNK]"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    spm = PreTrainedTokenizerFast(tokenizer_object=made)
    assert spm.encode(" yes") == [3, 2]
    setting = TaskSetting(spm, data=write(tmp_path, "boolq", RECORDS["boolq"]))
    # Not by load_tasks: a tokenizer of two words gets stand-ins.
    (task,) = (task for task in zeroshot.build(setting) if task.name == "zeroshot/boolq")
    assert isinstance(task, ChoiceTask)
    assert task.examples[0].options == ((1,), (2,))


def test_long_choices_are_cut_from_the_left(tmp_path: Path) -> None:
    data = write(tmp_path, "boolq", {**RECORDS["boolq"], "passage": "One two three. " * 20 + "The end."})
    whole = choices("boolq", data)[0]
    most = len(whole.context) + len(whole.question) + max(map(len, whole.options))
    assert choices("boolq", data, length=most)[0] == whole
    cut = choices("boolq", data, length=most - 7)[0]
    assert (cut.context, cut.question, cut.options) == (whole.context[7:], whole.question, whole.options)
    least = most - len(whole.context) + 1
    assert choices("boolq", data, length=least)[0].context == whole.context[-1:]
    with pytest.raises(ValueError, match=f"length={least - 1} is too short for zeroshot/boolq/0: give {least} or more"):
        choices("boolq", data, length=least - 1)


# LongBench's prompts


@longbench_tasks
@pytest.mark.parametrize("chat", [False, True])
def test_questions_are_those_of_longbench(name: str, chat: bool, tmp_path: Path) -> None:
    (question,) = questions(name, write(tmp_path, name, record(name)), chat=chat)
    prompt = PUBLISHED[name].replace("{input}", "Which {x}?").replace("{context}", "Some {text}.\nMore.")
    start, end = ("<user>", "</user><model>") if chat and name not in WITHOUT_CHAT else ("<s>", "")
    assert tokenizer().decode(question.context + question.question) == start + prompt + end
    assert tokenizer().decode(question.context).endswith("Some {text}.\nMore.")
    assert question.references == ("Paragraph 3", "b")
    assert question.max_new_tokens == MOST[name]
    assert question.name == f"zeroshot/{name}/0"


def test_long_prompts_keep_both_ends(tmp_path: Path) -> None:
    long = record("qasper", context="".join(f"Sentence {i}. " for i in range(400)))
    data = write(tmp_path, "qasper", long)
    (whole,) = questions("qasper", data, chat=True, length=10**5)
    (cut,) = questions("qasper", data, chat=True, length=1129)
    assert len(cut.context) + len(cut.question) == 1000  # half of 1129 - 128, twice
    assert cut.question == whole.question
    tokens, kept = whole.context + whole.question, cut.context + cut.question
    assert (kept[:500], kept[500:]) == (tokens[:500], tokens[-500:])
    room = len(tokens) + 128
    assert questions("qasper", data, chat=True, length=room)[0] == whole
    with pytest.raises(ValueError, match="length=129 leaves no prompt to zeroshot/qasper, which generates 128"):
        questions("qasper", data, chat=True, length=129)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(2, 70))
def test_the_middle_is_cut_wherever_the_question_begins(before: int, after: int, room: int) -> None:
    tokens = tuple(range(before + after))
    context, question = cut_middle(tokens[:before], tokens[before:], room)
    expected = tokens if len(tokens) <= room else tokens[: room // 2] + tokens[-(room // 2) :]
    assert context + question == expected
    assert all(token < before for token in context)
    assert all(token >= before for token in question)


# Scores


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("The cat, sat!", "a cat sat", 1.0),
        ("cat cat dog", "cat bird", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("cat cat", "cat cat dog", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("well-known", "wellknown", 1.0),
        ("theatre", "atre", 0.0),
        ("", "cat", 0.0),
        ("the", "the", 0.0),
    ],
)
def test_f1(text: str, reference: str, score: float) -> None:
    assert f1(text, reference) == pytest.approx(score)


def longest(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


DISTINCT = st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True)


@given(DISTINCT, DISTINCT)
def test_rouge_l_of_a_sentence_is_the_longest_common_subsequence(text: list[str], reference: list[str]) -> None:
    common = longest(text, reference)
    precision, recall = common / len(text), common / len(reference)
    expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(" ".join(text), " ".join(reference)) == pytest.approx(expected, abs=1e-7)


def test_rouge_l_of_sentences_is_their_union() -> None:
    # Lin 2004, section 3.2: w1 w2 of the first sentence and w1 w3 w5 of the second are 4 of the reference's 5 words.
    assert rouge_l("w1 w2 w6 w7 w8.w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5") == pytest.approx(
        2 * (4 / 8) * (4 / 5) / (4 / 8 + 4 / 5)
    )
    assert rouge_l("", "a b") == rouge_l("...", "a b") == 0.0
    assert rouge_l(" ".join(map(str, range(1200))), "1 2 3") == 0.0


def test_rouge_l_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(write(tmp_path, "samsum", record("samsum")), "trec", record("trec"))
    monkeypatch.setitem(sys.modules, "rouge", None)
    load_rouge.cache_clear()
    with pytest.raises(ValueError, match=r"^ROUGE-L needs the optional package rouge \(pip install 'kvenv\[tasks\]'\)"):
        questions("samsum", data)
    assert len(questions("trec", data)) == 1


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("Food", "Food", 1.0),
        ("Type: Food or City", "Food", 1 / 2),
        ("City", "Food", 0.0),
        ("food", "Food", 0.0),
        ("Code or Postcode", "Postcode", 1 / 2),  # "Code" isn't part of "Postcode"
        ("Other code", "Other code", 1.0),  # "code" is, and doesn't count
        ("Big other code", "Big other code", 1 / 2),  # as published, the second of two parts still counts
    ],
)
def test_classification(text: str, reference: str, score: float) -> None:
    classes = ("code", "other code", "Food", "City", "Code", "Postcode", "Other code", "Big other code")
    assert classification(text, reference, classes) == score


@pytest.mark.parametrize(
    ("text", "share"), [("3", 1.0), ("There are 3 of 30.", 0.5), ("3, 3 or 13", 2 / 3), ("three", 0.0), ("13", 0.0)]
)
def test_numbers(text: str, share: float) -> None:
    assert count(text, "3") == retrieval(text, "Paragraph 3") == pytest.approx(share)


def test_a_reference_without_paragraph_is_refused() -> None:
    with pytest.raises(ValueError, match="reference '3' names no paragraph"):
        retrieval("3", "3")


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("\n\nreturn x\nreturn y", "return x", 1.0),
        ("```python\n# comment\n// other\nreturn x", "return x", 1.0),
        ("abcd", "bcde", 0.75),  # 2 × 3 of 8
        ("abc", "ab", 0.8),
        ("abcab", "xab", 0.5),  # 2 × 2 of 8
        ("a", "bcaded", 0.29),  # 2 × 1 of 7 in whole percent
        ("# only a comment", "x = 1", 0.0),
        ("x # y", "x", 0.0),
    ],
)
def test_code_similarity(text: str, reference: str, score: float) -> None:
    assert code_similarity(text, reference) == score


def test_the_best_reference_counts_and_the_first_line_only_where_asked() -> None:
    assert best(f1)("two", ("one", "two", "three")) == 1.0
    assert best(f1)("two", ()) == 0.0
    assert best(f1, first_line=True)("\n\none two\nthree", ("one two three",)) == pytest.approx(0.8)
    assert best(f1)("\n\none two\nthree", ("one two three",)) == 1.0


@longbench_tasks
def test_every_task_scores_as_published(name: str, tmp_path: Path) -> None:
    task = load(name, write(tmp_path, name, record(name)))
    assert isinstance(task, QuestionTask)
    assert task.schedule == "prefill"
    f1_of, rouge_of = pytest.approx(2 / 3), pytest.approx(2 / 3, abs=1e-6)
    text, references, score = {
        "trec": ("Food\nCity", ("Food",), 1.0),
        "triviaqa": ("one\ntwo", ("one",), 1.0),
        "samsum": ("one\ntwo", ("one",), pytest.approx(1.0)),
        **dict.fromkeys(("gov_report", "qmsum", "multi_news"), ("The\none", ("no", "one"), rouge_of)),
        "passage_count": ("5 or 6", ("6",), 0.5),
        "passage_retrieval_en": ("Paragraph 5 or 6", ("Paragraph 6",), 0.5),
        "lcc": ("# a\nx = 1", ("x = 1",), 1.0),
        "repobench-p": ("# a\nx = 1", ("x = 1",), 1.0),
    }.get(name, ("The one\ntwo", ("no", "one"), f1_of))
    assert task.score(text, references) == score


# Data


def test_each_task_needs_its_own_data_only(tmp_path: Path) -> None:
    write(tmp_path, "boolq", RECORDS["boolq"])
    tasks = load_tasks("zeroshot", TaskSetting(tokenizer(), data=tmp_path))
    assert [task.name for task in tasks] == [f"zeroshot/{name}" for name in (*PROMPTS, *PUBLISHED)]
    assert len(choices("boolq", tmp_path)) == 1
    for name in ("arc_easy", "qasper"):
        with pytest.raises(FileNotFoundError, match=rf"the data lack .*{name}\.jsonl"):
            (choices if name in PROMPTS else questions)(name, tmp_path)


def test_examples_have_an_order_that_is_the_same_however_many_are_wanted(tmp_path: Path) -> None:
    data = write(tmp_path, "boolq", *({**RECORDS["boolq"], "passage": str(i)} for i in range(10)))
    order = [int(choice.name.split("/")[-1]) for choice in choices("boolq", data, num_examples=10)]
    assert sorted(order) == [*range(10)]
    for wanted in (20, 10, 4, 1):
        found = choices("boolq", data, num_examples=wanted)
        assert [choice.name for choice in found] == [f"zeroshot/boolq/{i}" for i in order[:wanted]]
        assert [tokenizer().decode(choice.context[1:]) for choice in found] == [str(i) for i in order[:wanted]]
    task = load("boolq", data)
    assert isinstance(task, ChoiceTask)
    assert [choice.name for choice in task.examples[8:]] == [f"zeroshot/boolq/{i}" for i in order[8:]]
    with pytest.raises(IndexError, match="there are 0 to 9"):
        task.examples[10]


def test_the_first_examples_are_of_all_parts_of_a_sorted_data_set(tmp_path: Path) -> None:
    data = write(tmp_path, "boolq", *({**RECORDS["boolq"], "passage": str(i)} for i in range(2000)))
    numbers = [int(choice.name.split("/")[-1]) for choice in choices("boolq", data, num_examples=200)]
    # Of 200 drawn from ten parts alike, 20 are of each part, with a standard deviation of 4.
    assert all(8 <= sum(number // 200 == part for number in numbers) <= 32 for part in range(10))


CHOICES = RECORDS["arc_easy"]["choices"]


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("boolq", "{oops", ":2: not JSON"),
        ("boolq", [1], ":2: list where an object was expected"),
        ("boolq", {"question": "q"}, ":2: lacks passage, answer; it has question"),
        ("boolq", {**RECORDS["boolq"], "answer": "yes"}, ":2: .*answer yes is none of False, True"),
        ("arc_easy", {**RECORDS["arc_easy"], "answerKey": "A"}, ":2: .*answerKey A is none of 1, 2"),
        ("arc_easy", {**RECORDS["arc_easy"], "choices": ["a"]}, ":2: a record unlike those of allenai/ai2_arc"),
        ("arc_easy", {**RECORDS["arc_easy"], "choices": {"text": ["a"]}}, ":2: .*KeyError: 'label'"),
        ("arc_easy", {**RECORDS["arc_easy"], "choices": {**CHOICES, "text": ["a"]}}, ":2: .*1 options with 2 labels"),
        ("hellaswag", {**RECORDS["hellaswag"], "label": ""}, ":2: .*label  is none of 0, 1, 2, 3"),
        ("hellaswag", {**RECORDS["hellaswag"], "ctx_b": 7}, ":2: .*AttributeError"),
        ("mmlu", {**RECORDS["mmlu"], "choices": ["a", "b"]}, ":2: .*choices must be four, not 2"),
        ("mmlu", {**RECORDS["mmlu"], "answer": 4}, ":2: .*answer 4 is none of 0, 1, 2, 3"),
        ("qasper", {"context": "c", "input": "i"}, ":2: lacks answers; it has context, input"),
        ("qasper", record("qasper", answers="yes"), ":2: .*answers must be a list of strings"),
        ("qasper", record("qasper", input=5), ":2: .*TypeError"),
        ("trec", record("qasper"), ":2: lacks all_classes"),
    ],
)
def test_malformed_records_are_named(name: str, line: object, says: str, tmp_path: Path) -> None:
    good = RECORDS[name] if name in PROMPTS else record(name)
    with pytest.raises(ValueError, match=says) as error:
        (choices if name in PROMPTS else questions)(name, write(tmp_path, name, good, line))
    assert str(error.value).startswith(f"{tmp_path / name}.jsonl:2: ")


def test_choices_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = {
        ("google/boolq", None, "validation"): RECORDS["boolq"],
        ("allenai/ai2_arc", "ARC-Challenge", "test"): RECORDS["arc_challenge"],
        ("allenai/ai2_arc", "ARC-Easy", "test"): RECORDS["arc_easy"],
        ("Rowan/hellaswag", None, "validation"): RECORDS["hellaswag"],
        ("cais/mmlu", "all", "test"): RECORDS["mmlu"],
    }

    class Datasets:
        @staticmethod
        def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
            return [hub[name, config, split]]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)  # type: ignore[arg-type]
    for name, (_, question, *_) in PROMPTS.items():
        assert tokenizer().decode(choices(name, None)[0].question) == question
    del hub["google/boolq", None, "validation"]
    with pytest.raises(ValueError, match=r"'google/boolq' can't be loaded .* a directory with boolq.jsonl"):
        choices("boolq", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'kvenv\[tasks\]'"):
        choices("mmlu", None)


def test_longbench_comes_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", json.dumps(record("qasper", context="Grüße"), ensure_ascii=False))
        archive.writestr("data/lcc.jsonl", "{}\n{oops")

    def download(name: str, file: str, repo_type: str) -> str:
        assert (name, repo_type) == ("zai-org/LongBench", "dataset")
        return str(tmp_path / file)

    monkeypatch.setattr(longbench, "hf_hub_download", download)
    assert tokenizer().decode(questions("qasper", None)[0].context).endswith("Article: Grüße")
    with pytest.raises(ValueError, match=r"'zai-org/LongBench' can't be loaded .*trec.jsonl"):
        questions("trec", None)
    with pytest.raises(ValueError, match=r"zai-org/LongBench/lcc.jsonl:2: not JSON"):
        questions("lcc", None)
    (tmp_path / "data.zip").unlink()
    with pytest.raises(ValueError, match=r"can't be loaded \(.*No such file.* a directory with qasper.jsonl"):
        questions("qasper", None)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'zeroshot/lsht': zeroshot has .*boolq, .*qasper, .*/lcc"):
        load("lsht", None)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_evaluation_data_serve_nothing_else(split: str) -> None:
    with pytest.raises(ValueError, match=rf"split='{split}': zeroshot has only .* split='test'"):
        load("boolq", None, split=split)
