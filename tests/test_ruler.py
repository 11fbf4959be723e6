"""RULER: prompts are parsed and solved again by other means than those that made them."""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvenv.tasks import Question, QuestionTask, TaskSetting, load_tasks
from kvenv.tasks.ruler import build
from kvenv.tasks.ruler.words import CommonWords, FrequentWords, english
from kvenv.tasks.scoring import string_match_all, string_match_part

NIAH = "single_1 single_2 single_3 multikey_1 multikey_2 multikey_3 multivalue multiquery".split()
NAMES = [f"ruler/{name}" for name in [*(f"niah_{name}" for name in NIAH), "vt", "cwe", "fwe", "qa_1", "qa_2"]]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CHAT = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"

# RULER's constants.py, word by word, with the singular that niah.py makes of the first.
NEEDLES_TEXT = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind}s afterwards.\n{context}\nWhat are all the special magic {kind}s for {query} mentioned in the provided "
    "text? The special magic {kind}s for {query} mentioned in the provided text are"
)
NEEDLE_TEXT = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text is"
)
VT_TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, 5 variables are assgined the value {query}, they are: "
)
CWE_TEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
FWE_TEXT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)
QA_TEXT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me "
    "the answer and do not output any other words.\n\nQuestion: {query} Answer:"
)


def sentence(random: Random) -> str:
    """Return a random sentence of lower-case words."""
    words = (
        "people like to make small things that work and ideas often look wrong at first while good ones grow".split()
    )
    return " ".join(random.choices(words, k=random.randint(4, 14))).capitalize() + random.choice(".!?")


def text(random: Random, sentences: int) -> str:
    return " ".join(sentence(random) for _ in range(sentences))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE, as Qwen's, trained on what prompts are made of."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = [NOISE, NEEDLES_TEXT, NEEDLE_TEXT, VT_TEXT, CWE_TEXT, FWE_TEXT, QA_TEXT, text(Random(0), 100)]
    tokenizer.train_from_iterator([part for part in texts for _ in range(20)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def squad_articles() -> list[dict]:
    """Return articles as SQuAD 2.0 has them; every third question has no answer."""
    random, articles = Random(1), []
    for article in range(25):
        paragraphs = []
        for number in range(5):
            key, context = f"{article}.{number}", text(random, 6)
            answered = {"text": f"answer {key}", "answer_start": 0}
            paragraphs.append(
                {
                    "context": f"{context} The answer {key} is here.",
                    "qas": [
                        {"question": f"What is {key}?", "is_impossible": False, "answers": [answered, answered]},
                        {"question": f"What else is {key}?", "is_impossible": False, "answers": [answered]},
                        {"question": f"What isn't {key}?", "is_impossible": True, "answers": []},
                    ],
                }
            )
        articles.append({"title": f"Article {article}", "paragraphs": paragraphs})
    return articles


def hotpot_records() -> list[dict]:
    """Return records as HotpotQA's file has them."""
    random = Random(2)
    return [
        {
            "question": f"Who is {number}?",
            "answer": f"person {number}",
            "context": [
                [f"Title {number}-{part}", [sentence(random), f" It is person {number}."]] for part in range(10)
            ],
        }
        for number in range(30)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what isn't generated, in the files that RULER's scripts make."""
    directory = tmp_path_factory.mktemp("ruler")
    essays = "\n\n".join(text(Random(number), 8) for number in range(80))
    (directory / "PaulGrahamEssays.json").write_text(json.dumps({"text": f"{essays}\n"}))
    (directory / "squad.json").write_text(json.dumps({"version": "v2.0", "data": squad_articles()}))
    (directory / "hotpotqa.json").write_text(json.dumps(hotpot_records()))
    return directory


@pytest.fixture(scope="module")
def tasks(tokenizer: PreTrainedTokenizerFast, data: Path) -> dict[int, dict[str, QuestionTask]]:
    """All tasks by length and name, for RULER's short prompts and for its usual ones; questions are made once."""
    settings = {length: TaskSetting(tokenizer, length, num_examples=6, data=data) for length in (2600, 9000)}
    return {
        length: {task.name: replace(task, examples=list(task.examples)) for task in build(setting)}
        for length, setting in settings.items()
    }


def load(name: str, setting: TaskSetting) -> QuestionTask:
    (task,) = load_tasks(name, setting)
    assert isinstance(task, QuestionTask)
    return task


def total(question: Question) -> int:
    return len(question.context) + len(question.question) + question.max_new_tokens


def whole(tokenizer: PreTrainedTokenizerFast, question: Question) -> str:
    return tokenizer.decode(question.context + question.question)


def parse(template: str, prompt: str, **known: str) -> dict[str, str]:
    """Return what stands for a template's fields; each field's second occurrence must be the first's text."""
    pattern, seen = "", set()
    for part in re.split(r"(\{\w+\})", template):
        if not re.fullmatch(r"\{\w+\}", part):
            pattern += re.escape(part)
        elif (name := part[1:-1]) in known:
            pattern += re.escape(known[name])
        else:
            pattern += f"(?P={name})" if name in seen else f"(?P<{name}>.*)"
            seen.add(name)
    found = re.fullmatch(pattern, prompt, re.DOTALL)
    assert found, f"{prompt[:300]} ... {prompt[-300:]}"
    return found.groupdict()


@pytest.fixture(params=[2600, 9000])
def length(request: pytest.FixtureRequest) -> int:
    return request.param


# What every task does.


def test_there_are_the_13_of_the_original_with_its_answers_lengths(
    tasks: dict[int, dict[str, QuestionTask]], length: int
) -> None:
    assert list(tasks[length]) == NAMES
    answers = {name: task.examples[0].max_new_tokens for name, task in tasks[length].items()}
    rest = {"ruler/vt": 30, "ruler/cwe": 120, "ruler/fwe": 50, "ruler/qa_1": 32, "ruler/qa_2": 32}
    assert answers == dict.fromkeys(NAMES[:8], 128) | rest
    assert {task.schedule for task in tasks[length].values()} == {"prefill"}


@pytest.mark.parametrize("name", NAMES)
def test_prompts_fit_the_length_and_fill_it(tasks: dict[int, dict[str, QuestionTask]], length: int, name: str) -> None:
    questions = tasks[length][name].examples
    assert len(questions) == 6
    for number, question in enumerate(questions):
        assert question.name == f"{name}/{number}"
        assert 0.95 * length < total(question) <= length


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_the_same_whatever_else_is_asked(
    tokenizer: PreTrainedTokenizerFast, data: Path, tasks: dict[int, dict[str, QuestionTask]], name: str
) -> None:
    few = TaskSetting(tokenizer, 2600, num_examples=4, data=data)
    again = {task.name: task for task in build(few)}[name].examples
    assert again[3] == tasks[2600][name].examples[3]
    assert again[1:3] == [tasks[2600][name].examples[i] for i in (1, 2)]
    assert len({question.context for question in again}) == 4
    with pytest.raises(IndexError, match="example 4 does not exist"):
        again[4]


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_different(tokenizer: PreTrainedTokenizerFast, data: Path, name: str) -> None:
    prompts = set()
    for split in ("train", "validation", "test"):
        task = load(name, TaskSetting(tokenizer, 2600, num_examples=3, split=split, data=data))
        prompts |= {question.context for question in task.examples}
    assert len(prompts) == 9
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        build(TaskSetting(tokenizer, split="dev"))


@pytest.mark.parametrize("name", NAMES)
def test_a_length_that_is_too_short_names_the_least(tokenizer: PreTrainedTokenizerFast, data: Path, name: str) -> None:
    task = load(name, TaskSetting(tokenizer, 100, data=data))
    with pytest.raises(ValueError, match=rf"{name}/0 doesn't fit into length=100: it takes at least \d+") as error:
        task.examples[0]
    least = int(re.findall(r"at least (\d+)", str(error.value))[0])
    for length, fits in ((least, True), (least - 1, False)):
        task = load(name, TaskSetting(tokenizer, length, data=data))
        if fits:
            assert len(task.examples[0].context) > 0
        else:
            with pytest.raises(ValueError, match="doesn't fit"):
                task.examples[0]


@given(name=st.sampled_from(NAMES), length=st.integers(150, 2500), number=st.integers(0, 15))
def test_prompts_fit_any_length_or_are_refused(
    tokenizer: PreTrainedTokenizerFast, data: Path, name: str, length: int, number: int
) -> None:
    questions = load(name, TaskSetting(tokenizer, length, data=data)).examples
    try:
        tokens, refused = total(questions[number % len(questions)]), False
    except ValueError as error:
        tokens, refused = int(re.findall(r"at least (\d+)", str(error))[0]), True
    assert refused == (tokens > length)


def test_prompts_fit_where_no_other_document_does(tokenizer: PreTrainedTokenizerFast, data: Path) -> None:
    alone = 0
    for length in range(190, 500, 10):
        with suppress(ValueError):  # some documents are longer than others
            for question in load("ruler/qa_1", TaskSetting(tokenizer, length, num_examples=5, data=data)).examples:
                assert total(question) <= length
                alone += whole(tokenizer, question).count("Document ") == 1 and total(question) < 0.97 * length
    assert alone > 2


@pytest.mark.parametrize("name", NAMES)
def test_the_chat_template_is_around_the_prompt(
    tokenizer: PreTrainedTokenizerFast, data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    plain, chat = (
        load(name, TaskSetting(tokenizer, 2600, num_examples=1, data=data, chat=on)).examples[0] for on in (False, True)
    )
    assert tokenizer.decode(chat.context).startswith("<|user|>")
    question = tokenizer.decode(plain.question)
    cut = question.rindex(" The special magic" if name.startswith("ruler/niah") else " Answer:")
    assert tokenizer.decode(chat.question) == f"{question[:cut]}<|end|><|assistant|>{question[cut:]}"
    assert total(chat) <= 2600


def test_an_example_is_tokenized_about_once(
    tokenizer: PreTrainedTokenizerFast, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = tokenizer.encode
    for task in build(TaskSetting(tokenizer, 2600, num_examples=10, data=data)):
        task.examples[0]
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "encode", lambda text, **kw: encoded.append(len(text)) or encode(text, **kw))
            made = sum(len(whole(tokenizer, question)) for question in task.examples)
        assert sum(encoded) < 3 * made
        encoded.clear()


# What each task is, found in the text.


def needles(prompt: str) -> list[tuple[str, str, str]]:
    """Return kind, key and value of all needles in order."""
    return re.findall(r"One of the special magic (\w+)s for ([^:]+) is: ([\w-]+)\.", prompt)


@pytest.mark.parametrize("name", NAMES[:8])
def test_needles_are_hidden_as_often_as_they_should_and_asked_for(
    tokenizer: PreTrainedTokenizerFast, tasks: dict[int, dict[str, QuestionTask]], length: int, name: str
) -> None:
    kind = "uuid" if name in ("ruler/niah_single_3", "ruler/niah_multikey_3") else "number"
    several = name in ("ruler/niah_multivalue", "ruler/niah_multiquery")
    hidden = {"multikey_1": 4, "multivalue": 4, "multiquery": 4}.get(name.removeprefix("ruler/niah_"), 1)
    for question in tasks[length][name].examples:
        prompt = whole(tokenizer, question)
        parts = parse(NEEDLES_TEXT if several else NEEDLE_TEXT, prompt, kind=kind)
        asked = re.split(r", and |, ", parts["query"])
        assert len(asked) == (4 if name == "ruler/niah_multiquery" else 1)
        found = needles(parts["context"])
        assert sorted(value for _, key, value in found if key in asked) == sorted(question.references)
        assert len(question.references) == (4 if several else 1)
        if name in ("ruler/niah_multikey_2", "ruler/niah_multikey_3"):
            assert len(found) > 20
            assert len(found) == len({key for _, key, _ in found}) == parts["context"].count("\n") + 1
        else:
            assert len(found) == hidden
        for form, key, value in found:
            assert form == kind
            assert re.fullmatch(r"[1-9]\d{6}", value) if kind == "number" else uuid.UUID(value).version == 4
            if name == "ruler/niah_multikey_3":
                assert uuid.UUID(key).version == 4
            else:
                assert is_adjective_and_noun(key)


@cache
def listed(kind: str) -> set[str]:
    """Return the words of a file of wonderwords."""
    assets = Path(sys.modules["wonderwords"].__file__ or "").parent / "assets"
    return {line.strip() for line in (assets / f"{kind}list.txt").read_text().split("\n")}


def test_values_of_a_key_lie_in_any_order(
    tokenizer: PreTrainedTokenizerFast, tasks: dict[int, dict[str, QuestionTask]]
) -> None:
    questions = tasks[2600]["ruler/niah_multivalue"].examples
    orders = {
        tuple(question.references.index(value) for *_, value in needles(whole(tokenizer, question)))
        for question in questions
    }
    assert len(orders) > 2


def is_adjective_and_noun(key: str) -> bool:
    cuts = [i for i, letter in enumerate(key) if letter == "-"]
    return any(key[:cut] in listed("adjective") and key[cut + 1 :] in listed("noun") for cut in cuts)


def test_needles_lie_anywhere_between_the_lines_of_noise(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    task = load("ruler/niah_single_1", TaskSetting(tokenizer, 1000, num_examples=150))
    places = []
    for question in task.examples:
        lines = parse(NEEDLE_TEXT, whole(tokenizer, question), kind="number")["context"].split("\n")
        (place,) = [i for i, line in enumerate(lines) if line != NOISE]
        places.append(place / (len(lines) - 1))
    assert min(places) == 0
    assert 0.4 < sum(places) / len(places) < 0.6
    assert 0.9 < max(places) < 1


@pytest.mark.parametrize("name", [name for name in NAMES[:8] if not name.endswith(("_single_1", "key_2", "key_3"))])
def test_needles_lie_at_depths_of_the_essays(
    tokenizer: PreTrainedTokenizerFast, data: Path, tasks: dict[int, dict[str, QuestionTask]], length: int, name: str
) -> None:
    essays = json.loads((data / "PaulGrahamEssays.json").read_text())["text"].split()
    depths = {round(100 * i / 39) for i in range(40)}
    found = set()
    for question in tasks[length][name].examples:
        context = tokenizer.decode(question.context).split("afterwards.\n", 1)[1]
        parts = re.split(r"(One of the special magic \w+ for [^:]+ is: [\w-]+\.)", context)
        words = " ".join(parts[::2]).split()
        assert words == (essays * 3)[: len(words)]
        sentences = [len(re.findall(r"[.!?](?= |$)", part)) for part in parts[::2]]
        total = sum(sentences) + (not re.search(r"[.!?]\s*$", parts[-1]))
        for number in range(1, len(sentences)):
            before = sum(sentences[:number])
            at = {depth for depth in depths if int(total * (depth / 100)) in (before, before + 1)}
            assert at, (before, total)
            found |= at
    assert len(found) > 4


def test_essays_begin_again_where_they_end(tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path) -> None:
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": "One small essay. It ends here."}))
    task = load("ruler/niah_single_2", TaskSetting(tokenizer, 1000, num_examples=1, data=tmp_path))
    context = tokenizer.decode(task.examples[0].context)
    assert context.count("One small essay. It ends here. One small") > 15


def solve_chain(text: str, value: str) -> list[str]:
    """Return the variables that have a value once all assignments of a text are carried out in order."""
    memory: dict[str, str] = {}
    for name, source in re.findall(r"VAR ([A-Z]+) = (\d+|VAR [A-Z]+)", text):
        memory[name] = memory[source.removeprefix("VAR ")] if source.startswith("VAR") else source
    return [name for name, held in memory.items() if held == value]


def test_variables_are_those_that_hold_the_value(
    tokenizer: PreTrainedTokenizerFast, tasks: dict[int, dict[str, QuestionTask]], length: int
) -> None:
    for question in tasks[length]["ruler/vt"].examples:
        example, prompt = whole(tokenizer, question).split("\n\n\n\n")
        parts = parse(VT_TEXT, prompt)
        assert re.fullmatch(r"[1-9]\d{4}", parts["query"])
        assert solve_chain(parts["context"], parts["query"]) == list(question.references)
        assert [len(name) for name in question.references] == [5] * 5
        lines = re.sub(r"VAR [A-Z]+ = (VAR [A-Z]+ |\d+) ?", "", parts["context"]).split("\n")
        assert {line.strip() for line in lines[:-1]} == {NOISE}
        assert lines[-1] == ""

        shown = parse(VT_TEXT + " {answer}", example)
        assert shown["answer"].split(" ") == solve_chain(shown["context"], shown["query"])
        assert [len(name) for name in shown["answer"].split(" ")] == [3] * 5
        assert shown["context"].count(NOISE) == 10


def numbered(text: str) -> list[str]:
    """Return the words of a numbered list, which may have spaces in them."""
    entries = re.findall(r"(\d+)\. (.*?)(?= \d+\. |$)", text)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    return [word for _, word in entries]


def test_common_words_are_the_most_common(
    tokenizer: PreTrainedTokenizerFast, tasks: dict[int, dict[str, QuestionTask]], length: int
) -> None:
    often, seldom = (6, 1) if length < 4096 else (30, 3)
    for question in tasks[length]["ruler/cwe"].examples:
        example, prompt = whole(tokenizer, question).split("\nBelow is")
        words = numbered(parse(CWE_TEXT, f"Below is{prompt}")["context"])
        counts = Counter(words)
        assert {word for word, count in counts.items() if count == often} == set(question.references)
        assert Counter(counts.values()) == {often: 10, seldom: len(counts) - 10}
        assert len(counts) > 10
        assert set(words[-50:]) & set(question.references)  # shuffled, not those first

        shown = parse(CWE_TEXT + "{answer}", example)
        counts = Counter(numbered(shown["context"]))
        assert shown["answer"].startswith("1. ")
        often_shown, size = (3, 20) if length < 4096 else (10, 40)
        assert {word for word, count in counts.items() if count == often_shown} == set(numbered(shown["answer"]))
        assert Counter(counts.values()) == {often_shown: 10, often_shown // 3: size - 10}


def test_common_words_are_repeated_more_often_from_4096_on() -> None:
    for length, often in ((4095, 6), (4096, 30)):
        prompt = CommonWords(length).draw(np.random.default_rng(0), 0, 20)
        assert Counter(numbered(prompt.context.split("\n")[-1]))[prompt.references[0]] == often


def test_frequent_words_are_the_most_frequent(
    tokenizer: PreTrainedTokenizerFast, tasks: dict[int, dict[str, QuestionTask]], length: int
) -> None:
    for question in tasks[length]["ruler/fwe"].examples:
        words = parse(FWE_TEXT, whole(tokenizer, question))["context"].split(" ")
        (dots, most), *ranked = Counter(words).most_common()
        assert dots == "..."
        assert all(re.fullmatch(r"[a-z]{6}", word) for word, _ in ranked)
        assert tuple(word for word, _ in ranked[:3]) == question.references
        assert ranked[2][1] > ranked[3][1]
        # Rank k has about 1/k^2 of what the first has, for as long as that is a whole repetition.
        for rank, (_, count) in enumerate(ranked, start=2):
            assert abs(count - most / rank**2) <= 1
        assert dots in words[-50:]  # shuffled, not those first


def test_the_fourth_most_frequent_word_is_never_the_third() -> None:
    for size in range(FrequentWords.least, 250):
        prompt = FrequentWords(1000).draw(np.random.default_rng(0), 0, size)
        words = parse(FWE_TEXT, prompt.context + prompt.question + prompt.answer)["context"].split(" ")
        ranked = Counter(words).most_common()
        assert ranked[3][1] > ranked[4][1]


def documents(context: str) -> list[str]:
    """Return numbered documents."""
    parts = re.split(r"(?:^|\n\n)Document (\d+):\n", context)
    assert parts[0] == ""
    assert parts[1::2] == [str(number) for number in range(1, len(parts) // 2 + 1)]
    return parts[2::2]


def test_squad_is_asked_among_documents_of_its_article_first(
    tokenizer: PreTrainedTokenizerFast, tasks: dict[int, dict[str, QuestionTask]], length: int
) -> None:
    articles = squad_articles()
    places = set()
    for question in tasks[length]["ruler/qa_1"].examples:
        parts = parse(QA_TEXT, whole(tokenizer, question))
        key = re.fullmatch(r"What (?:else )?is (\d+)\.(\d+)\?", parts["query"])
        assert key
        article = [paragraph["context"] for paragraph in articles[int(key[1])]["paragraphs"]]
        listed = documents(parts["context"])
        assert len(listed) == len(set(listed))
        assert article[int(key[2])] in listed
        assert set(question.references) == {f"answer {key[1]}.{key[2]}"}
        assert set(article) < set(listed)
        assert set(listed) <= {p["context"] for other in articles for p in other["paragraphs"]}
        places.add(listed.index(article[int(key[2])]))
    assert len(places) > 2


def test_hotpotqa_is_asked_among_all_its_documents(
    tokenizer: PreTrainedTokenizerFast, tasks: dict[int, dict[str, QuestionTask]], length: int
) -> None:
    records = {record["question"]: record for record in hotpot_records()}
    for question in tasks[length]["ruler/qa_2"].examples:
        parts = parse(QA_TEXT, whole(tokenizer, question))
        record, listed = records[parts["query"]], documents(parts["context"])
        assert {f"{title}\n{''.join(sentences)}" for title, sentences in record["context"]} < set(listed)
        assert question.references == (record["answer"],)


@pytest.mark.parametrize(("name", "length"), [("ruler/qa_1", 800), ("ruler/qa_2", 2600)])
def test_every_question_belongs_to_one_split(
    tokenizer: PreTrainedTokenizerFast, data: Path, name: str, length: int
) -> None:
    asked: list[str] = []
    for split in ("train", "validation", "test"):
        task = load(name, TaskSetting(tokenizer, length, num_examples=500, split=split, data=data))
        asked += [parse(QA_TEXT, whole(tokenizer, question))["query"] for question in task.examples]
    if name == "ruler/qa_1":
        assert sorted(asked) == sorted(
            found["question"] for a in squad_articles() for p in a["paragraphs"] for found in p["qas"][:2]
        )
    else:
        assert sorted(asked) == sorted(record["question"] for record in hotpot_records())


# Scores.


def test_scores_count_the_references_that_are_in_the_text() -> None:
    references = ("Alpha", "beta", "7")
    assert string_match_all("beta, ALPHA and 47", references) == 1
    assert string_match_all("alphabet", references) == pytest.approx(1 / 3)
    assert string_match_all("", references) == 0
    assert string_match_part("a BETA version", references) == 1
    assert string_match_part("nothing of it", references) == 0


def test_only_question_answering_takes_one_reference_for_all(tasks: dict[int, dict[str, QuestionTask]]) -> None:
    for name, task in tasks[2600].items():
        references = task.examples[0].references
        assert task.score(" ".join(references).upper(), references) == 1
        assert task.score(f"It is {references[0]}.", ("never there", references[0])) == (1 if "qa" in name else 0.5)


# Data.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The ``datasets`` package, with both data sets as the hub has them; what was asked for."""
    asked: list[tuple] = []
    stub = ModuleType("datasets")
    stub.__spec__ = ModuleSpec("datasets", None)

    def load_dataset(name: str, config: str | None, split: str) -> list[dict]:
        asked.append((name, config, split))
        if name == "rajpurkar/squad_v2":
            return [
                {
                    "id": found["question"],
                    "title": article["title"],
                    "context": paragraph["context"],
                    "question": found["question"],
                    "answers": {"text": [a["text"] for a in found["answers"]], "answer_start": [0]},
                }
                for article in squad_articles()
                for paragraph in article["paragraphs"]
                for found in paragraph["qas"]
            ]
        return [
            record
            | {"context": {"title": [t for t, _ in record["context"]], "sentences": [s for _, s in record["context"]]}}
            for record in hotpot_records()
        ]

    stub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    return asked


def test_the_hub_gives_what_the_files_give(
    tokenizer: PreTrainedTokenizerFast, tasks: dict[int, dict[str, QuestionTask]], hub: list[tuple], tmp_path: Path
) -> None:
    for name, asked in (
        ("ruler/qa_1", ("rajpurkar/squad_v2", None, "validation")),
        ("ruler/qa_2", ("hotpotqa/hotpot_qa", "distractor", "validation")),
    ):
        for directory in (None, tmp_path):  # a directory without the file is one for other data
            task = load(name, TaskSetting(tokenizer, 2600, num_examples=6, data=directory))
            assert list(task.examples) == list(tasks[2600][name].examples)
            assert hub.pop() == asked
            assert hub == []


def test_what_is_missing_is_said_in_one_error(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it weren't installed
    with pytest.raises(ValueError, match="can't be run") as error:
        load_tasks("ruler", TaskSetting(tokenizer, data=tmp_path))
    lacking, ready = str(error.value).split("Ready are: ")
    assert ready.split(", ") == [NAMES[i] for i in (0, 4, 5, 8, 9, 10)]
    for name, what in (
        ("niah_multiquery", "PaulGrahamEssays.json"),
        ("qa_1", "squad.json"),
        ("qa_2", "hotpotqa.json"),
        ("niah_single_2", "scripts/data/synthetic/json/download_paulgraham_essay.py"),
        ("qa_1", "pip install 'kvenv[tasks]'"),
    ):
        assert name in lacking
        assert what in lacking
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"ruler/niah_single_2: PaulGrahamEssays\.json"):
        load_tasks("ruler/niah_single_2", TaskSetting(tokenizer))
    task = load("ruler/niah_single_1", TaskSetting(tokenizer, 1000))
    assert task.examples[0].references


def test_a_task_without_its_data_fails_when_it_is_asked(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for directory in (None, tmp_path):
        found = {task.name: task for task in build(TaskSetting(tokenizer, data=directory))}
        with pytest.raises(FileNotFoundError, match=r"PaulGrahamEssays\.json"):
            found["ruler/niah_single_2"].examples[0]
        with pytest.raises(ValueError, match=r"squad\.json"):
            found["ruler/qa_1"].examples[0]
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    english.cache_clear()
    found = {task.name: task for task in build(TaskSetting(tokenizer, 2600))}
    for name in ("ruler/niah_single_1", "ruler/cwe"):
        assert "wonderwords" in found[name].missing
        with pytest.raises(ValueError, match=r"wonderwords \(pip install 'kvenv\[tasks\]'\)"):
            found[name].examples[0]
    for name in ("ruler/niah_multikey_3", "ruler/vt", "ruler/fwe"):
        assert not found[name].missing
        assert found[name].examples[0].references


@pytest.mark.parametrize(
    ("file", "content", "name", "message"),
    [
        ("PaulGrahamEssays.json", '{"essay": "x"}', "ruler/niah_single_2", r"Essays\.json: lacks text; it has essay"),
        ("squad.json", '{"version": 2}', "ruler/qa_1", "SQuAD:1: lacks title, context, question, answers"),
        ("squad.json", '{"data": [{"title": "x"}]}', "ruler/qa_1", "an article of SQuAD: lacks paragraphs"),
        ("hotpotqa.json", '[{"question": "x"}]', "ruler/qa_2", "HotpotQA:1: lacks answer, context"),
        ("hotpotqa.json", '[{"question"', "ruler/qa_2", r"hotpotqa\.json:1: not JSON"),
    ],
)
def test_malformed_data_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, file: str, content: str, name: str, message: str
) -> None:
    (tmp_path / file).write_text(content)
    task = load(name, TaskSetting(tokenizer, data=tmp_path))
    with pytest.raises(ValueError, match=message):
        task.examples[0]
