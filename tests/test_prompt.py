"""Prompts are encoded as a whole, in whatever template, and cut where the question begins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvenv.tasks.prompt import Framer
from tests import local_model

# Qwen2's: line ends go with what stands before them.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def joining_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that has a token for a question mark with the end of its line."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(["Is it?\nAnswer: yes.\n"] * 3, trainers.BpeTrainer(initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def space_marking_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that sets a space in front of every text, as Llama 2's does."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    characters = sorted(set("▁\n" + local_model.TEXT))
    bpe.train_from_iterator(
        [local_model.TEXT.replace(" ", "▁")], trainers.BpeTrainer(initial_alphabet=characters, special_tokens=["<unk>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", unk_token="<unk>")


TOKENIZERS = [joining_tokenizer(), space_marking_tokenizer(), local_model.byte_level_tokenizer()]
TEXTS = st.text(st.sampled_from("Is it?\n .:é漢12"), min_size=1, max_size=12)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["joins", "marks spaces", "byte level"])
@given(context=TEXTS, question=TEXTS)
def test_both_parts_are_those_of_the_whole(tokenizer: PreTrainedTokenizerFast, context: str, question: str) -> None:
    framer = Framer(tokenizer, chat=False)
    first, second = framer.frame(context, question, " A:")
    start = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    assert first + second == start + framer.encode(f"{context}{question} A:")


def test_a_token_of_both_belongs_to_the_question() -> None:
    tokenizer = joining_tokenizer()
    framer = Framer(tokenizer, chat=False)
    first, second = framer.frame("Is it?", "\nAnswer:")
    assert tokenizer.decode(first) == "Is it"
    assert tokenizer.decode(second) == "?\nAnswer:"


def test_the_template_stands_around_both() -> None:
    tokenizer = local_model.byte_level_tokenizer()
    first, second = Framer(tokenizer).frame("One.", " Two?", " Three")
    assert tokenizer.decode(first) == "<|user|>One."
    assert tokenizer.decode(second) == " Two?<|end|><|assistant|> Three"


def test_the_sign_of_the_place_may_be_in_the_text() -> None:
    tokenizer = local_model.byte_level_tokenizer()
    first, second = Framer(tokenizer).frame("a\u241eb", "c\u241e\u241e")
    assert tokenizer.decode(first + second) == "<|user|>a\u241ebc\u241e\u241e<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no users') }}", r"refuses a user's message \(no users\): leave the template out"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "shows a user's message 2 times"),
        ("nothing", "shows a user's message 0 times: leave the template out"),
    ],
)
def test_templates_that_show_no_prompt_are_refused(template: str, message: str) -> None:
    tokenizer = local_model.byte_level_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        Framer(tokenizer).frame("One.", " Two?")
    assert Framer(tokenizer, chat=False).frame("One.", " Two?")[0]
