"""A model directory as a user has one: an architecture and a tokenizer that kvenv does not bring, and traces."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
TEXT = "What is 12 + 7? Let us add them: 10 and 2 and 7 make 19. The answer is 19. Then 3 times 4 is 12, minus 5 is 7."


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with a chat template: it spells any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([TEXT], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=list(SPECIAL)))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|endoftext|>", chat_template=CHAT
    )


def make_model(directory: Path) -> Path:
    """Save a small random Qwen3 with a tokenizer of its own and return the directory."""
    tokenizer = byte_level_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_traces(path: Path, count: int = 6) -> Path:
    """Write prompts with responses as JSON lines and return the file."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(count):
        sums = [(int(a), int(b)) for a, b in rng.integers(1, 99, size=(12, 2))]
        response = " ".join(f"{a} + {b} is {a + b}." for a, b in sums)
        lines.append({"prompt": "Add some numbers, please.", "response": response, "answer": str(sum(sums[-1]))})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
