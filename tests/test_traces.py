"""Trace families and user traces: deterministic, split three ways, exact spans, honest continuations, clear errors."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from experiments.quality import quality
from experiments.relevance import Arguments, auc, relevance
from experiments.tiny_model import build_tokenizer
from kvenv.models import TINY
from kvenv.registry import TRACES, register_traces
from kvenv.traces import FAMILIES, SPLITS, Trace, load_traces, tiny_vocabulary
from kvenv.traces.family import FamilySource
from kvenv.traces.source import Encoder, TraceSource
from kvenv.traces.words import FILLER, FIRST, SECOND, WORDS, split_of_word
from tests import local_model

TOKENIZER: PreTrainedTokenizerBase = build_tokenizer()
families = pytest.mark.parametrize("family", FAMILIES)
splits = pytest.mark.parametrize("split", SPLITS)


def source(family: str, split: str = "test", trace_length: int = 256, schedule: str = "periodic") -> FamilySource:
    """Return a family's source with the tiny tokenizer."""
    found = load_traces(family, split=split, tokenizer=TOKENIZER, trace_length=trace_length, schedule=schedule)
    assert isinstance(found, FamilySource)
    return found


def words_of(trace: Trace) -> list[str]:
    """Return the text of a trace as words, BOS left out."""
    return TOKENIZER.decode(trace.tokens[1:]).split()


@families
@splits
def test_same_id_same_trace(family: str, split: str) -> None:
    one, two = source(family, split), source(family, split)
    for trace_id in (0, 7, 10**9):
        a, b = one[trace_id], two[trace_id]
        assert a.tokens.tolist() == b.tokens.tolist()
        assert (a.answers, a.prompt_length, a.name) == (b.answers, b.prompt_length, f"{family}/{split}/{trace_id}")
    assert one[0].tokens.tolist() != one[1].tokens.tolist()


def test_known_trace_stays_the_same() -> None:
    # Published results name trace ids: a change of these words is a change of every trace.
    text = " ".join(words_of(source("recall")[0])[:14])
    assert text == "now trust only miller , porter and sailor . today sailor claims that the"


@families
@pytest.mark.parametrize("trace_length", [2, 100, 513])
def test_exact_lengths(family: str, trace_length: int) -> None:
    traces = source(family, trace_length=trace_length)
    for trace_id in range(10):
        trace = traces[trace_id]
        assert trace.tokens.shape == (trace_length,)
        assert trace.tokens.dtype == np.int64
        assert trace.tokens[0] == TOKENIZER.bos_token_id
        assert all(0 < start < stop <= trace_length for start, stop in trace.answers)
        assert 0 < trace.prompt_length <= traces.max_prompt_length <= trace_length


@families
@splits
def test_answers_are_values_of_the_split(family: str, split: str) -> None:
    traces = source(family, split, trace_length=512)
    spans = [(traces[i], span) for i in range(10) for span in traces[i].answers]
    assert len(spans) > 60
    for trace, (start, stop) in spans:
        word = TOKENIZER.decode(trace.tokens[start:stop])
        assert split_of_word(word) == split
        assert TOKENIZER.decode(trace.tokens[stop : stop + 1]) in (".", "to", "")


@families
def test_answers_follow_from_the_text(family: str) -> None:
    """Every answer's word was told before, or (reasoning) is joined from two that were."""
    traces = source(family, trace_length=512)
    for trace_id in range(10):
        trace = traces[trace_id]
        for start, stop in trace.answers:
            word = TOKENIZER.decode(trace.tokens[start:stop])
            before = TOKENIZER.decode(trace.tokens[1:start]).split()
            parts = [w for w in before if len(w) == 4 and w[:2] in FIRST and w[2:] in SECOND]
            assert word in before or (
                family == "reasoning" and word[:2] in {w[:2] for w in parts} and word[2:] in {w[2:] for w in parts}
            )


@families
def test_a_question_names_one_live_fact(family: str) -> None:
    """Facts are used only after they were told, and recall asks each at most once."""
    for trace_id in range(10):
        told: set[int] = set()
        used: list[int] = []
        for sentence, _, _ in source(family, trace_length=1024).sentences(trace_id):
            assert set(sentence.used) <= told
            assert len(sentence.answers) > 0 or not sentence.used
            used += sentence.used
            if sentence.told is not None:
                assert sentence.told not in told
                told.add(sentence.told)
        assert len(set(used)) > 5
        if family == "recall":
            assert len(set(used)) == len(used)


def test_words_of_the_splits_are_disjoint_and_share_their_syllables() -> None:
    for a, b in itertools.combinations(SPLITS, 2):
        assert not WORDS[a] & WORDS[b]
    assert {w[:2] for w in WORDS["train"]} == set(FIRST)
    assert {w[2:] for w in WORDS["train"]} == set(SECOND)
    assert WORDS["test"] == {a + b for a in FIRST[:20] for b in SECOND[:20]}
    with pytest.raises(ValueError, match="'lamp' is not a made-up word"):
        split_of_word("lamp")


def test_phrasings_and_filler_of_the_splits_are_disjoint() -> None:
    tables = [FILLER, *(table for family in FAMILIES.values() for table in family.tables.values())]
    for table in tables:
        for a, b in itertools.combinations(SPLITS, 2):
            assert table[a]
            assert not set(table[a]) & set(table[b])


@families
def test_no_test_word_in_training_traces(family: str) -> None:
    traces = source(family, "train", trace_length=512)
    seen = {word for trace_id in range(20) for word in words_of(traces[trace_id])}
    assert not seen & (WORDS["test"] | WORDS["validation"])
    assert len(seen & WORDS["train"]) > 100


@given(
    family=st.sampled_from(list(FAMILIES)),
    trace_id=st.integers(0, 1000),
    cut=st.integers(0, 256),
    count=st.integers(1, 4),
)
def test_continuations_share_the_prefix(family: str, trace_id: int, cut: int, count: int) -> None:
    traces = source(family)
    futures = traces.continuations(trace_id, cut, count)
    assert len(futures) == count
    for future in futures:
        assert future.tokens.shape == (256,)
        assert future.tokens[:cut].tolist() == traces[trace_id].tokens[:cut].tolist()
        assert future.prompt_length == traces[trace_id].prompt_length
        for start, stop in future.answers:
            assert TOKENIZER.decode(future.tokens[start:stop]) in WORDS["test"]
    again = traces.continuations(trace_id, cut, count)
    assert [a.tokens.tolist() for a in again] == [f.tokens.tolist() for f in futures]


@families
def test_continuations_differ_and_answer_by_the_past(family: str) -> None:
    traces = source(family, trace_length=512)
    futures = traces.continuations(3, 200, 8)
    assert len({future.tokens.tobytes() for future in futures}) == 8
    past = set(TOKENIZER.decode(traces[3].tokens[:200]).split())
    recalled = 0
    for future in futures:
        after = [span for span in future.answers if span[0] >= 200]
        recalled += sum(TOKENIZER.decode(future.tokens[start:stop]) in past for start, stop in after)
    assert recalled > 8


@pytest.mark.parametrize("cut", [-1, 257])
def test_a_cut_outside_the_trace_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match=f"cut={cut} .* 0 to trace_length=256"):
        source("recall").continuations(0, cut, 1)


def test_prefill_has_half_of_the_trace_as_prompt() -> None:
    traces = source("tracking", trace_length=301, schedule="prefill")
    assert traces[0].prompt_length == traces.max_prompt_length == 150


def test_families_are_endless_and_begin_at_zero() -> None:
    traces = source("dialogue")
    assert traces.size is None
    with pytest.raises(TypeError, match="endless"):
        len(traces)
    with pytest.raises(IndexError, match="trace -1 of 'dialogue'"):
        traces[-1]


# Tokenizers


WORD = st.sampled_from([t for t in tiny_vocabulary() if not t.startswith("##")])
OTHER = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=12)


@given(st.lists(st.one_of(WORD, OTHER), min_size=1, max_size=30))
def test_tokenizer_gives_text_back(words: list[str]) -> None:
    text = " ".join(words)
    ids = TOKENIZER.encode(text)
    assert ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids[1:]) == text


def test_made_up_words_are_two_tokens_and_common_words_one() -> None:
    for word in sorted(set().union(*WORDS.values())):
        assert TOKENIZER.tokenize(word) == [word[:2], f"##{word[2:]}"]
    common = [t for t in tiny_vocabulary() if not t.startswith("##")]
    assert all(TOKENIZER.tokenize(word) == [word] for word in common)


def test_bundled_tokenizer_is_the_built_one() -> None:
    bundled = AutoTokenizer.from_pretrained(TINY)
    assert bundled.get_vocab() == TOKENIZER.get_vocab()
    text = "Trust only miller , porter ; kalo-mive is 42 !"
    assert bundled.encode(text) == TOKENIZER.encode(text)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Return a small byte-level BPE tokenizer without BOS, as Qwen's is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [" ".join(words_of(source(family, "train")[i])) for family in FAMILIES for i in range(10)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@families
def test_spans_are_exact_with_another_tokenizer(family: str) -> None:
    tokenizer = byte_level_tokenizer()
    assert Encoder(tokenizer).start == []
    traces = load_traces(family, split="test", tokenizer=tokenizer, trace_length=900)
    trace = traces[0]
    text = tokenizer.decode(trace.tokens)
    assert tokenizer.encode(text)[:890] == trace.tokens[:890].tolist()
    assert len(trace.answers) > 3
    for start, stop in trace.answers:
        assert tokenizer.decode(trace.tokens[start:stop]).strip() in WORDS["test"]


# The user's own traces


def write(path: Path, *records: object) -> str:
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return str(path)


def test_jsonl_forms(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl",
        {"input_ids": [5, 6, 7]},
        {"text": "the old lamp"},
        "",
        {"prompt": "what is kalo ?", "response": "mive , no , it is mive .", "answer": "mive"},
    )
    traces = load_traces(path, split="test", tokenizer=TOKENIZER, trace_length=64)
    assert len(traces) == 3
    assert traces[0].tokens.tolist() == [5, 6, 7]
    assert TOKENIZER.decode(traces[1].tokens[1:]) == "the old lamp"
    last = traces[2]
    assert last.prompt_length == traces.max_prompt_length == 6
    assert TOKENIZER.decode(last.tokens[6:]) == "mive , no , it is mive ."
    ((start, stop),) = last.answers
    assert (TOKENIZER.decode(last.tokens[start:stop]), stop) == ("mive", len(last.tokens) - 1)
    with pytest.raises(IndexError, match="there are 0 to 2"):
        traces[3]
    with pytest.raises(ValueError, match="only the trace families can"):
        traces.continuations(0, 1, 1)


def test_messages_win_over_a_prompt_without_response(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} . {% endfor %}"
    messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "mive"}]
    path = write(tmp_path / "mine.jsonl", {"messages": messages}, {"prompt": "ask", "messages": messages})
    plain, both = (load_traces(path, tokenizer=tokenizer, trace_length=64)[i] for i in range(2))
    assert both.tokens.tolist() == plain.tokens.tolist()
    assert both.prompt_length == plain.prompt_length > 0
    path = write(tmp_path / "two.jsonl", {"prompt": "ask", "response": "mive", "messages": messages})
    with pytest.raises(ValueError, match="prompt and messages given"):
        load_traces(path, tokenizer=tokenizer, trace_length=64)


def test_jsonl_traces_are_cut(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl", {"prompt": "a b", "response": "c d e", "answer": "e"}, {"text": "a b c d e f"}
    )
    traces = load_traces(path, tokenizer=TOKENIZER, trace_length=5, schedule="prefill")
    assert [len(traces[i].tokens) for i in (0, 1)] == [5, 5]
    assert traces[0].answers == ()
    assert [traces[i].prompt_length for i in (0, 1)] == [3, 2]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{oops", "not JSON"),
        ("[1, 2]", "list where an object was expected"),
        ({}, "none given: give exactly one of input_ids, text, prompt .with response., messages"),
        ({"text": "a", "input_ids": [1]}, "input_ids and text given"),
        ({"input_ids": []}, "input_ids must be a list of token ids"),
        ({"input_ids": [1, "2"]}, "input_ids must be a list of token ids"),
        ({"input_ids": [1, -2]}, "input_ids must be a list of token ids"),
        ({"input_ids": [1, 2**64]}, "input_ids must be a list of token ids"),
        ({"text": 5}, "text must be a string"),
        ({"prompt": "a"}, "response must be a string"),
        ({"prompt": "a", "response": "b", "answer": "c"}, "answer 'c' does not occur in the response"),
        ({"prompt": "a " * 40, "response": "b"}, "the prompt has 41 tokens"),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path: Path, line: object, says: str) -> None:
    path = write(tmp_path / "mine.jsonl", {"text": "fine"}, line)
    with pytest.raises(ValueError, match=says) as error:
        load_traces(path, tokenizer=TOKENIZER, trace_length=32)
    assert str(error.value).startswith(f"{path}:2: ")


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "the old\u2028lamp"}\r\n\n{"text": "the\x85river"}\n', encoding="utf-8")
    traces = load_traces(str(path), tokenizer=TOKENIZER, trace_length=32)
    assert [TOKENIZER.decode(traces[i].tokens[1:]) for i in range(2)] == ["the old lamp", "the river"]


@pytest.mark.parametrize("name", ["mine.txt", "mine.jsonl"])
def test_files_that_are_not_utf8_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=rf"{name}': not UTF-8 \(unexpected end of data at byte 3\)"):
        load_traces(str(tmp_path / name), tokenizer=TOKENIZER)


def test_text_files_are_cut_into_traces(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("the old lamp stands near the river .\n" * 10)
    traces = load_traces(str(path), tokenizer=TOKENIZER, trace_length=33)
    assert len(traces) == 2
    assert [len(traces[i].tokens) for i in range(2)] == [33, 33]
    assert TOKENIZER.decode(traces[1].tokens[1:9]) == "the old lamp stands near the river ."
    assert traces.max_prompt_length == 0
    path.write_text("short")
    assert len(load_traces(str(path), tokenizer=TOKENIZER, trace_length=33)) == 1
    path.write_text(" ")
    with pytest.raises(ValueError, match="holds no text"):
        load_traces(str(path), tokenizer=TOKENIZER)


def test_registered_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TRACES, "_values", dict(TRACES._values))

    def counting(trace_id: int, *, split: str, trace_length: int, tokenizer: object) -> Trace:
        return Trace(np.arange(trace_length) + trace_id, 1, (), f"{split}/{trace_id}")

    register_traces("counting", counting)
    traces = load_traces("counting", split="validation", tokenizer=TOKENIZER, trace_length=4)
    assert traces[2].tokens.tolist() == [2, 3, 4, 5]
    assert (traces[2].name, traces.max_prompt_length, traces.size) == ("validation/2", 1, None)
    register_traces("wrong", lambda trace_id, **_: [1])
    with pytest.raises(ValueError, match="'wrong' returned list"):
        load_traces("wrong", tokenizer=TOKENIZER)[0]
    with pytest.raises(ValueError, match="'recall' is already registered"):
        register_traces("recall", counting)


def test_dataset_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(name: str, split: str) -> list[dict[str, object]]:
            if split != "test":
                raise KeyError(split)
            return [{"text": "the old lamp", "input_ids": None, "source": name}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)  # type: ignore[arg-type]
    traces = load_traces("hf:someone/lamps", split="test", tokenizer=TOKENIZER)
    assert TOKENIZER.decode(traces[0].tokens[1:]) == "the old lamp"
    with pytest.raises(ValueError, match="'hf:someone/lamps' split 'train' cannot be loaded"):
        load_traces("hf:someone/lamps", split="train", tokenizer=TOKENIZER)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'kvenv\[datasets\]'"):
        load_traces("hf:someone/lamps", tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("answer", "marked"), [("mive", True), ("kalo", False), ("", False), (42, False), (None, False)]
)
def test_a_dataset_may_mean_something_else_by_answer(
    answer: object, marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(name: str, split: str) -> list[dict[str, object]]:
            return [{"prompt": "what is kalo ?", "response": "it is mive", "answer": answer}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)  # type: ignore[arg-type]
    trace = load_traces("hf:someone/lamps", split="test", tokenizer=TOKENIZER)[0]
    assert TOKENIZER.decode(trace.tokens[trace.prompt_length :]) == "it is mive"
    assert [TOKENIZER.decode(trace.tokens[start:stop]) for start, stop in trace.answers] == ["mive"] * marked


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "recal"}, "unknown traces 'recal': known are recall, tracking, dialogue, reasoning"),
        ({"split": "dev"}, "unknown split 'dev': known are train, validation, test"),
        ({"schedule": "never"}, "unknown schedule 'never': known are periodic, prefill"),
        ({"trace_length": 1}, "trace_length must be an integer of at least 2, not 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_traces(**{"name": "recall", "tokenizer": TOKENIZER, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[" * 5000, "not JSON"),
        ('{"input_ids": [' + "9" * 5000 + "]}", "not JSON .*4300 digits"),
        (r'{"text": "\ud800"}', "text must be a string"),
        (r'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\udc00"}]}', "both text"),
        ('{"messages": [{"role": ["user"], "content": "x"}, {"role": "assistant", "content": "y"}]}', "both text"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}', "chat template"),
    ],
)
def test_lines_that_are_no_traces_are_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text('{"input_ids": [5, 6]}\n' + line)
    with pytest.raises(ValueError, match=f"traces.jsonl:2.*{says}"):
        load_traces(str(path), tokenizer=TOKENIZER)


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_traces("x" * 5000 + ".txt", tokenizer=TOKENIZER)
    with pytest.raises(FileNotFoundError, match=r"'nowhere.jsonl': no such file"):
        load_traces("nowhere.jsonl", tokenizer=TOKENIZER)


def test_without_a_tokenizer_only_token_ids_will_do(tmp_path: Path) -> None:
    path = write(tmp_path / "ids.jsonl", {"input_ids": [5, 6, 7]})
    assert load_traces(path, tokenizer=None)[0].tokens.tolist() == [5, 6, 7]
    for name in ("recall", write(tmp_path / "text.jsonl", {"text": "the old lamp"})):
        with pytest.raises(ValueError, match="need a tokenizer"):
            load_traces(name, tokenizer=None)[0]


# What the families and the bundled LLM promise


@families
def test_token_identity_tells_little(family: str) -> None:
    for value in relevance(family, TOKENIZER, Arguments(traces=40)):
        assert 0.3 < value < 0.7


def test_auc_counts_ordered_pairs() -> None:
    scores, labels = np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, True, False, True])
    assert auc(scores, labels) == pytest.approx(3.5 / 4)
    with pytest.raises(ValueError, match="both kinds are needed"):
        auc(scores, np.ones(4, dtype=bool))


@families
def test_bundled_llm_answers_held_out_questions(family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    score = quality(model, tokenizer, family, trace_length=512, traces=6)
    assert score.answers > 40
    assert score.accuracy >= (0.95 if family == "recall" else 0.85)


MESSAGES = [
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "Let me see: 3 + 4 makes 7."},
]


def chat_traces(tmp_path: Path, **record: object) -> TraceSource:
    (tmp_path / "chat.jsonl").write_text(json.dumps(record) + "\n")
    return load_traces(str(tmp_path / "chat.jsonl"), tokenizer=local_model.byte_level_tokenizer(), trace_length=400)


def test_messages_are_put_into_the_chat_template(tmp_path: Path) -> None:
    tokenizer = local_model.byte_level_tokenizer()
    trace = chat_traces(tmp_path, messages=MESSAGES, answer="7")[0]
    prompt, response = trace.tokens[: trace.prompt_length], trace.tokens[trace.prompt_length :]
    assert tokenizer.decode(prompt) == "<|user|>What is 3 + 4?<|end|><|assistant|>"
    assert tokenizer.decode(response) == "Let me see: 3 + 4 makes 7.<|end|>"
    ((start, stop),) = trace.answers
    assert tokenizer.decode(trace.tokens[start:stop]).strip() == "7"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "two or more objects with role and content"),
        (MESSAGES[:1], "two or more objects"),
        ([{"role": "user"}, MESSAGES[1]], "two or more objects"),
        ("hello", "two or more objects"),
        (MESSAGES[::-1], "the last message must be the assistant's, not the user's"),
    ],
)
def test_malformed_messages_are_refused(messages: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"chat\.jsonl:1: .*{message}"):
        chat_traces(tmp_path, messages=messages)


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    with pytest.raises(ValueError, match="need a tokenizer with a chat template"):
        load_traces(str(tmp_path / "chat.jsonl"), tokenizer=TOKENIZER, trace_length=400)


def test_a_template_that_hides_thoughts_is_told_them(tmp_path: Path) -> None:
    tokenizer = local_model.byte_level_tokenizer()
    # As DeepSeek's: what was thought isn't told again, and an answer is made to begin with thinking.
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    )
    messages = [MESSAGES[0], {"role": "assistant", "content": "<think>\nwell</think>7"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    trace = load_traces(str(tmp_path / "chat.jsonl"), tokenizer=tokenizer, trace_length=400)[0]
    assert tokenizer.decode(trace.tokens) == "<|user|>What is 3 + 4?<|assistant|><think>\nwell</think>7<|end|>"
    assert tokenizer.decode(trace.tokens[trace.prompt_length :]) == "well</think>7<|end|>"
