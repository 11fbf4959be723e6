"""Perplexity, entropy and reasoning: how data become traces and prompts, exact grades, clear errors."""

from __future__ import annotations

import json
import random
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvenv.tasks import Examples, Question, QuestionTask, Task, TaskSetting, TraceTask, load_tasks
from kvenv.tasks.dialogues import flatten, trees
from kvenv.tasks.grading import boxed, same_letter, same_number
from kvenv.traces import Trace

PROMPT = "Please solve the following problem step by step and put the final answer within \\boxed{}.\n"
CHAT = (
    "{%- if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
WORDS = "the lamp, a river: 3 boats? Yes! I think 12.5 of them".split()


@cache
def tokenizer(chat: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a small byte-level BPE tokenizer, with a chat template or without."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([" ".join(WORDS)] * 5, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>" if bos else None)
    made.chat_template = CHAT if chat else None
    return made


def setting(data: Path | None = None, **changes: Any) -> TaskSetting:
    return TaskSetting(**{"tokenizer": tokenizer(), "length": 64, "num_examples": 5, "data": data, **changes})


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path.parent


def traced(name: str, chosen: TaskSetting) -> TraceTask:
    (task,) = load_tasks(name, chosen)
    assert isinstance(task, TraceTask)
    return task


def asked(name: str, chosen: TaskSetting) -> QuestionTask:
    (task,) = load_tasks(name, chosen)
    assert isinstance(task, QuestionTask)
    return task


def list_of(task: TraceTask) -> list[Trace]:
    return [task.source[i] for i in range(len(task.source))]


class Datasets:
    """The package ``datasets``, as far as it is used; remembers what it was asked for."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records
        self.asked: list[tuple[str, str | None, str]] = []

    def load_dataset(self, name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        self.asked.append((name, config, split))
        return self.records


def hub(monkeypatch: pytest.MonkeyPatch, *records: dict[str, Any]) -> Datasets:
    stub = Datasets(list(records))
    monkeypatch.setitem(sys.modules, "datasets", stub)  # type: ignore[arg-type]
    return stub


# What all tasks share


def test_examples_are_counted_when_asked() -> None:
    counted = []
    examples = Examples(lambda: counted.append(1) or 3, lambda i: i * i)  # type: ignore[func-returns-value]
    assert not counted
    assert (len(examples), list(examples), examples[1:], counted) == (3, [0, 1, 4], [1, 4], [1])
    with pytest.raises(IndexError, match="there are 0 to 2"):
        examples[3]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokenizer": None}, "need a tokenizer"),
        ({"length": 1}, "length=1 is too short"),
        ({"num_examples": 0}, "num_examples=0 is too few"),
        ({"split": "dev"}, "unknown split 'dev': known are train, validation, test"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        setting(**changes)


def test_tasks_have_names_and_schedules_without_any_data(tmp_path: Path) -> None:
    def named(benchmark: str) -> list[tuple[str, str]]:
        tasks: list[Task] = list(load_tasks(benchmark, setting(tmp_path)))
        assert all(task.note == "" for task in tasks)
        return [(task.name, task.schedule) for task in tasks]

    assert named("perplexity") == [("perplexity/dialogue", "prefill"), ("perplexity/text", "prefill")]
    assert named("entropy") == [("entropy/text", "periodic")]
    assert named("reasoning") == [(f"reasoning/{name}", "periodic") for name in ("aime24", "aime25", "gpqa")]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("perplexity/dialogue", "oasst2.jsonl"),
        ("perplexity/text", "text.txt"),
        ("entropy/text", "text.txt"),
        ("reasoning/aime24", "aime24.jsonl"),
        ("reasoning/gpqa", "gpqa.jsonl"),
    ],
)
def test_missing_files_are_named(tmp_path: Path, name: str, file: str) -> None:
    (task,) = load_tasks(name, setting(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"the data lack .*{file}"):
        len(task.source if isinstance(task, TraceTask) else task.examples)  # type: ignore[attr-defined]


# Dialogues


def message(name: str, parent: str | None, **changes: Any) -> dict[str, Any]:
    role = "prompter" if parent is None else "assistant"
    known = {"message_id": name, "parent_id": parent, "text": f"I am {name}", "role": role, "lang": "en"}
    return {**known, "rank": None, "deleted": False, "review_result": True, "tree_state": "ready_for_export", **changes}


def nested(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a table of messages as OpenAssistant's trees, by recursion."""

    def grow(record: dict[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in record.items() if key != "tree_state"}
        return {**own, "replies": [grow(r) for r in records if r["parent_id"] == record["message_id"]]}

    roots = [record for record in records if record["parent_id"] is None]
    return [{"message_tree_id": r["message_id"], "tree_state": r["tree_state"], "prompt": grow(r)} for r in roots]


def read_aloud(records: list[dict[str, Any]], parent: str | None = None) -> list[str]:
    """Return the texts in the order of the docstring: a plain recursion over the table."""
    told = []
    replies = [record for record in records if record["parent_id"] == parent]
    if parent is not None:
        replies.sort(key=lambda record: 99 if record["rank"] is None else record["rank"])
    for record in replies:
        ready = parent is not None or record["tree_state"] == "ready_for_export"
        if ready and record["lang"] == "en" and not record["deleted"] and record["review_result"] in (True, None):
            told += [record["text"], *read_aloud(records, record["message_id"])]
    return told


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw up to three trees as a table whose rows are in any order."""
    count = draw(st.integers(1, 14))
    records: list[dict[str, Any]] = []
    for number in range(count):
        parent = draw(st.sampled_from([None, *(record["message_id"] for record in records)])) if number else None
        changes = {
            "rank": draw(st.sampled_from([None, number])),
            "lang": draw(st.sampled_from(["en"] * 5 + ["de"])),
            "deleted": draw(st.sampled_from([False] * 5 + [True])),
            "review_result": draw(st.sampled_from([True, True, True, None, False])),
            "tree_state": draw(st.sampled_from(["ready_for_export"] * 3 + ["growing"])),
        }
        records.append(message(f"m{number}", parent, **changes))
    return draw(st.permutations(records))


@given(tables())
def test_trees_are_flattened_best_reply_first(records: list[dict[str, Any]]) -> None:
    expected = read_aloud(records)
    for form in (records, nested(records)):
        told = [text for tree in trees(form, "here") for _, text in flatten(tree, "here")]
        assert told == expected


def conversation(*texts: str) -> list[dict[str, Any]]:
    """Return a tree without branches."""
    roles = ("prompter", "assistant")
    names = [f"{texts[0]}-{number}" for number in range(len(texts))]
    return [
        message(name, names[i - 1] if i else None, text=text, role=roles[i % 2])
        for i, (name, text) in enumerate(zip(names, texts))
    ]


def test_an_unbranched_tree_reads_as_the_chat_template_writes_it(tmp_path: Path) -> None:
    texts = ["How many boats?", "3, I think.", "And lamps?", "A lamp.", "Yes!"]
    data = write(tmp_path / "oasst2.jsonl", *conversation(*texts))
    (trace,) = list_of(traced("perplexity/dialogue", setting(data, length=200)))
    roles = ["user", "assistant", "user", "assistant", "user"]
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    text = tokenizer().apply_chat_template(turns, tokenize=False).removesuffix("<|im_end|>\n")
    assert trace.tokens.tolist() == tokenizer().encode(text)
    assert "Be brief." in text


@pytest.mark.parametrize("bos", [False, True])
def test_without_a_template_roles_are_words(tmp_path: Path, bos: bool) -> None:
    data = write(tmp_path / "oasst2.jsonl", *conversation("How many?", "3"), *conversation("And you?", "I too"))
    plain = tokenizer(chat=False, bos=bos)
    (trace,) = list_of(traced("perplexity/dialogue", setting(data, tokenizer=plain)))
    start = "<s>" if bos else ""
    assert plain.decode(trace.tokens) == f"{start}User: How many?\nAssistant: 3\nUser: And you?\nAssistant: I too"
    assert trace.tokens[:1].tolist() == plain.encode("<s>" if bos else "U", add_special_tokens=False)
    (trace,) = list_of(traced("perplexity/dialogue", setting(data, chat=False)))
    assert tokenizer().decode(trace.tokens).startswith("User: How many?\nAssistant: 3\n")


def test_dialogues_are_packed_to_the_length(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(40)]
    data = write(tmp_path / "oasst2.jsonl", *(row for i in range(0, 40, 2) for row in conversation(*texts[i : i + 2])))
    task = traced("perplexity/dialogue", setting(data, length=50, num_examples=4))
    traces = list_of(task)
    assert (task.schedule, task.entropy, len(traces)) == ("prefill", False, 4)
    begin = tokenizer().encode("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    for number, trace in enumerate(traces):
        assert (len(trace.tokens), trace.prompt_length, trace.name) == (50, 25, f"oasst2/{number}")
        assert trace.tokens[: len(begin)].tolist() == begin
        first = tokenizer().decode(trace.tokens[len(begin) :]).split("<|im_end|>")[0]
        assert any(text.startswith(first) for text in texts[::2]), "a trace begins with a tree"
    assert task.source.max_prompt_length == 25
    more = list_of(traced("perplexity/dialogue", setting(data, length=50, num_examples=100)))
    assert [t.tokens.tolist() for t in more[:4]] == [t.tokens.tolist() for t in traces]
    assert all(len(trace.tokens) == 50 for trace in more)
    (all_there_is,) = list_of(traced("perplexity/dialogue", setting(data, length=10_000)))
    assert 50 < len(all_there_is.tokens) < 10_000


@pytest.mark.parametrize(("split", "part"), [("train", "train"), ("test", "validation[50%:]")])
def test_dialogues_from_the_hub(monkeypatch: pytest.MonkeyPatch, split: str, part: str) -> None:
    # A reply whose parent is on the other side of the cut is left out.
    stub = hub(monkeypatch, message("reply", "elsewhere"), *conversation("How many?", "3"))
    task = traced("perplexity/dialogue", setting(split=split))
    assert stub.asked == []
    assert "I am reply" not in tokenizer().decode(task.source[0].tokens)
    assert (stub.asked, task.source.split) == ([("OpenAssistant/oasst2", None, part)], split)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({}, r"oasst2.jsonl:2: lacks message_id"),
        (message("b", None, text=None), "message b: lacks text"),
        (message("b", None, text=5), "message b: text must be a string, not int"),
        (message("b", None, role="user"), "message b: role 'user' is unknown: known are prompter, assistant"),
        (["b"], "list where an object was expected"),
    ],
)
def test_malformed_messages_are_named(tmp_path: Path, record: object, says: str) -> None:
    task = traced("perplexity/dialogue", setting(write(tmp_path / "oasst2.jsonl", message("a", None), record)))
    with pytest.raises(ValueError, match=says):
        len(task.source)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"message_tree_id": "a"}, "oasst2.jsonl:2: lacks prompt; it has message_tree_id"),
        ({"prompt": "How many?"}, "oasst2.jsonl: str where an object was expected"),
        ({"prompt": {**message("a", None), "replies": ["3"]}}, "oasst2.jsonl: str where an object was expected"),
    ],
)
def test_malformed_trees_are_named(tmp_path: Path, tree: object, says: str) -> None:
    data = write(tmp_path / "oasst2.jsonl", *nested([message("a", None)]), tree)
    with pytest.raises(ValueError, match=says):
        len(traced("perplexity/dialogue", setting(data)).source)


@pytest.mark.parametrize("records", [[message("a", None, lang="de")], [message("a", None, tree_state="growing")]])
def test_no_tree_that_can_be_taken(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    task = traced("perplexity/dialogue", setting(write(tmp_path / "oasst2.jsonl", *records)))
    with pytest.raises(ValueError, match=r"oasst2.jsonl holds no English tree that is ready"):
        len(task.source)


# Plain text


def test_text_is_cut_and_half_of_it_is_prompt(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("3 boats? " * 200)
    plain = tokenizer().encode("3 boats? " * 200)
    task = traced("perplexity/text", setting(tmp_path))
    assert [trace.tokens.tolist() for trace in list_of(task)] == [plain[i * 64 : i * 64 + 64] for i in range(5)]
    assert {trace.prompt_length for trace in list_of(task)} == {32}
    (tmp_path / "more.txt").write_text("3")
    with pytest.raises(FileNotFoundError, match=r"the data lack .*text.txt: more.txt, other.txt are there"):
        len(traced("perplexity/text", setting(tmp_path)).source)
    (tmp_path / "text.txt").write_text("12.5 of them")
    (trace,) = list_of(traced("entropy/text", setting(tmp_path)))
    assert (tokenizer().decode(trace.tokens), trace.prompt_length) == ("12.5 of them", 0)


def test_text_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = hub(monkeypatch, {"text": ""}, {"text": " = Lamp = \n"}, {"text": " A lamp . \n"})
    (trace,) = list_of(traced("perplexity/text", setting()))
    assert tokenizer().decode(trace.tokens) == "\n\n = Lamp = \n\n\n A lamp . \n"
    list_of(traced("entropy/text", setting(split="train")))
    wikitext = ("Salesforce/wikitext", "wikitext-103-raw-v1")
    assert stub.asked == [(*wikitext, "test"), (*wikitext, "train[:5%]")]


def test_entropy_takes_traces_of_the_users(tmp_path: Path) -> None:
    records = [{"prompt": "How many?", "response": " 3, I think."}, {"text": "A lamp."}, {"text": "Yes!"}]
    data = write(tmp_path / "traces.jsonl", *records)
    (tmp_path / "text.txt").write_text("not taken")
    task = traced("entropy/traces", setting(data, num_examples=2))
    assert (task.schedule, task.entropy, len(task.source)) == ("periodic", True, 2)
    assert [trace.prompt_length for trace in list_of(task)] == [len(tokenizer().encode("How many?")), 0]
    assert tokenizer().decode(task.source[0].tokens) == "How many? 3, I think."
    write(tmp_path / "traces.jsonl", records[0], {"prompt": "How many?"})
    with pytest.raises(ValueError, match=r"traces.jsonl:2: response must be a string"):
        len(traced("entropy/traces", setting(data)).source)


# Reasoning


def text_of(question: Question, by: PreTrainedTokenizerFast) -> str:
    return by.decode(question.context + question.question)


def test_the_prompt_is_that_of_the_evaluators(tmp_path: Path) -> None:
    data = write(
        tmp_path / "aime24.jsonl", {"id": 60, "problem": "Find $x$.", "answer": "025", "question": "Find $x$."}
    )
    write(tmp_path / "aime25.jsonl", {"question": "Find $y$.", "answer": 7})
    question = asked("reasoning/aime24", setting(data, length=300)).examples[0]
    assert text_of(question, tokenizer()) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{PROMPT}Find $x$.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (question.name, question.references) == ("reasoning/aime24/0", ("025",))
    assert len(question.context) + len(question.question) + question.max_new_tokens == 300
    plain = tokenizer(chat=False, bos=True)
    question = asked("reasoning/aime25", setting(data, length=300, tokenizer=plain)).examples[0]
    assert (text_of(question, plain), question.references) == (f"<s>{PROMPT}Find $y$.", ("7",))


def test_no_more_questions_than_wanted_and_no_more_than_there_are(tmp_path: Path) -> None:
    data = write(tmp_path / "aime24.jsonl", *({"problem": f"{i}?", "answer": i} for i in range(8)))
    task = asked("reasoning/aime24", setting(data, length=300))
    assert [question.references for question in task.examples] == [(str(i),) for i in range(5)]
    assert len(asked("reasoning/aime24", setting(data, num_examples=20)).examples) == 8


def test_gpqa_in_the_form_of_the_evaluators(tmp_path: Path) -> None:
    problem = "How many?\n\nA) 1\nB) 2\nC) 3\nD) 4"
    data = write(tmp_path / "gpqa.jsonl", {"input": problem, "output": "C"}, {"problem": problem, "answer": "D"})
    first, second = asked("reasoning/gpqa", setting(data, length=300)).examples
    assert f"{PROMPT}{problem}<|im_end|>" in text_of(first, tokenizer())
    assert (first.references, second.references) == (("C",), ("D",))
    assert text_of(first, tokenizer()) == text_of(second, tokenizer())


def test_gpqa_in_the_form_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {f"Incorrect Answer {i}": f"wrong{i}\n" for i in (1, 2, 3)}
    records = [{"Question": f"Question {i}?", "Correct Answer": f" right{i}", **wrong} for i in range(40)]
    stub = hub(monkeypatch, *records)
    task = asked("reasoning/gpqa", setting(length=400, num_examples=40))
    texts = [text_of(question, tokenizer()) for question in task.examples]
    assert stub.asked == [("Idavidrein/gpqa", "gpqa_diamond", "train")]
    for i, (text, question) in enumerate(zip(texts, task.examples)):
        body = text.split(PROMPT)[1].split("<|im_end|>")[0]
        asks, _, *options = body.split("\n")
        assert asks == f"Question {i}?"
        assert sorted(option[3:] for option in options) == [f"right{i}", "wrong1", "wrong2", "wrong3"]
        assert [option[:3] for option in options] == ["A) ", "B) ", "C) ", "D) "]
        assert f"{question.references[0]}) right{i}" in options
    assert {question.references[0] for question in task.examples} == set("ABCD")
    hub(monkeypatch, *reversed(records))
    again = asked("reasoning/gpqa", setting(length=400, num_examples=40))
    assert [text_of(question, tokenizer()) for question in again.examples] == texts[::-1]


@pytest.mark.parametrize(
    ("file", "record", "says"),
    [
        ("aime24", {"answer": "5"}, r"aime24.jsonl:2: lacks problem or question; it has answer"),
        ("aime25", {"problem": "Find $x$.", "answer": " "}, r"aime25.jsonl:2: lacks answer; it has problem, answer"),
        ("aime25", {"problem": "Find $x$.", "answer": "{"}, r"aime25.jsonl:2: the answer must be a number, not '\{'"),
        ("aime25", {"problem": "Find $x$.", "answer": "none"}, "the answer must be a number, not 'none'"),
        ("gpqa", {"input": "Which?", "output": "G"}, "must be an option's letter, A to E, not 'G'"),
        ("gpqa", {"Question": "Which?", "Correct Answer": "3"}, "gpqa.jsonl:2: lacks Incorrect Answer 1, Incorrect"),
        ("gpqa", 7, "int where an object was expected"),
    ],
)
def test_malformed_problems_are_named(tmp_path: Path, file: str, record: object, says: str) -> None:
    fine = {"problem": "Which?", "answer": "B" if file == "gpqa" else "5"}
    task = asked(f"reasoning/{file}", setting(write(tmp_path / f"{file}.jsonl", fine, record)))
    with pytest.raises(ValueError, match=says):
        len(task.examples)


def test_a_length_that_the_prompt_fills(tmp_path: Path) -> None:
    data = write(tmp_path / "aime24.jsonl", {"problem": "Find $x$.", "answer": "5"})
    used = len(
        tokenizer().encode(text_of(asked("reasoning/aime24", setting(data, length=300)).examples[0], tokenizer()))
    )
    assert asked("reasoning/aime24", setting(data, length=used + 1)).examples[0].max_new_tokens == 1
    with pytest.raises(ValueError, match=rf"length={used} leaves no room .* its prompt has {used} tokens"):
        asked("reasoning/aime24", setting(data, length=used)).examples[0]


def test_only_numbers_need_math_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "aime24.jsonl", {"problem": "Find $x$.", "answer": "5"})
    write(tmp_path / "gpqa.jsonl", {"input": "Which?", "output": "A"})
    monkeypatch.setitem(sys.modules, "math_verify", None)
    task = asked("reasoning/gpqa", setting(data, length=300))
    assert task.score("\\boxed{A}", task.examples[0].references) == 1
    with pytest.raises(ValueError, match=r"math-verify: pip install 'kvenv\[tasks\]'"):
        len(asked("reasoning/aime24", setting(data)).examples)


# Grades


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("\\boxed{25}", "25"),
        ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("\\boxed{1}, no, \\boxed{ 2 }.", "2"),
        ("\\boxed {2}", "2"),
        ("\\boxed{3}, within \\boxed{}.", "3"),
        ("\\boxed{3} and cut off: \\boxed{4", "3"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("boxed{5}", ""),
        ("", ""),
    ],
)
def test_what_the_last_box_holds(text: str, holds: str) -> None:
    assert boxed(text) == holds


@pytest.mark.parametrize(
    ("text", "reference", "grade"),
    [
        ("The answer is \\boxed{25}.", "25", 1),
        ("\\boxed{025}", "25", 1),
        ("\\boxed{25}", "025", 1),
        ("\\boxed{025}", "025", 1),
        ("\\boxed{26}", "025", 0),
        ("\\boxed{250}", "025", 0),
        ("\\boxed{-25}", "025", 0),
        ("\\boxed{\\frac{50}{2}}", "25", 1),
        ("\\boxed{\\dfrac{51}{2}}", "25", 0),
        ("\\boxed{25.0}", "25", 1),
        ("\\boxed{5^2}", "25", 1),
        ("\\boxed{n = 25}", "25", 1),
        ("\\boxed{25^\\circ}", "25", 1),
        ("\\boxed{204\\text{ minutes}}", "204", 1),
        ("\\boxed{\\text{25}}", "25", 1),
        ("First \\boxed{24}, but \\boxed{25}.", "25", 1),
        ("First \\boxed{25}, but \\boxed{24}.", "25", 0),
        ("\\boxed{25}, \\boxed{24}", "25", 0),
        ("\\boxed{0}", "000", 1),
        ("25", "25", 0),
        ("I think \\boxed{25", "25", 0),
        ("\\boxed{}", "25", 0),
        ("\\boxed{\\frac{}", "25", 0),
        ("\\boxed{no idea}", "25", 0),
        ("I give up.", "25", 0),
        ("", "25", 0),
    ],
)
def test_grades_of_numbers(text: str, reference: str, grade: int) -> None:
    assert same_number(text, (reference,)) == grade


def test_a_number_may_equal_any_reference() -> None:
    assert same_number("\\boxed{7}", ("5", "7")) == 1


def test_numbers_are_graded_in_any_thread() -> None:
    grades: list[float] = []
    thread = threading.Thread(
        target=lambda: grades.extend(same_number(text, ("025",)) for text in ("\\boxed{25}", "\\boxed{5}"))
    )
    thread.start()
    thread.join()
    assert grades == [1, 0]


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("\\boxed{C}", 1),
        ("\\boxed{(C)}", 1),
        ("\\boxed{C)}", 1),
        ("\\boxed{C) 3.52 MeV}", 1),
        ("\\boxed{C. 3.52 MeV}", 1),
        ("\\boxed{\\text{C}}", 1),
        ("\\boxed{\\textbf{(C)} 3.52}", 1),
        ("\\boxed{\\mathrm{C}}", 1),
        ("\\boxed{$C$}", 1),
        ("\\boxed{B}, no: \\boxed{C}", 1),
        ("\\boxed{C}, no: \\boxed{B}", 0),
        ("\\boxed{CO2}", 0),
        ("\\boxed{C = benzoquinone}", 0),
        ("\\boxed{3.52 MeV}", 0),
        ("Answer: C", 1),
        ("**Answer:** C", 1),
        ("The answer is (C).", 1),
        ("Answer: B. But no. Answer: C", 1),
        ("Answer: B", 0),
        ("Answer: C = benzoquinone", 0),
        ("The answer is Carbon", 0),
        ("C", 0),
        ("", 0),
    ],
)
def test_grades_of_letters(text: str, grade: int) -> None:
    assert same_letter(text, ("C",)) == grade
