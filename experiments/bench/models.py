"""What is measured on: the bundled model, random weights in the shapes of others, and traces of random tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import kvenv
from kvenv.attention import use_kvenv_attention
from kvenv.models import LoadedModel, load_model
from kvenv.traces import Trace

LARGE, RANDOM = "bench-100m", "bench-random"
"""Registered names of the model, and of traces that any model can read."""

VOCABULARY = 256
"""Tokens that random traces are made of: every model has as many."""

_QWEN: dict[str, Any] = {
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-4B": _QWEN
    | {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": _QWEN
    | {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
"""Configurations of published models."""


@cache
def large(device: str) -> LoadedModel:
    """Return the 100 M-parameter model."""
    kvenv.register_model(LARGE, _random(device))
    return load_model(LARGE, device=device)


@cache
def register_random_traces() -> None:
    """Make traces of random tokens known under :data:`RANDOM`."""

    def trace(trace_id: int, *, split: str, trace_length: int, tokenizer: Any) -> Trace:
        tokens = np.random.default_rng(trace_id).integers(VOCABULARY, size=trace_length)
        return Trace(tokens, 0, (), f"{RANDOM}/{split}/{trace_id}")

    kvenv.register_traces(RANDOM, trace)


def in_shape(name: str, device: str) -> PreTrainedModel:
    """Return a model of random bfloat16 weights in one of :data:`SHAPES`, made where it stays."""
    config = AutoConfig.for_model(**SHAPES[name])
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    use_kvenv_attention(model)
    return model.eval().requires_grad_(False)


def work(model: PreTrainedModel, rows: int, tokens: int, filled: int) -> tuple[float, float]:
    """Return the bytes that must be read and the FLOPs of decoding a window over a filled cache, logits included.

    Parameters
    ----------
    model : PreTrainedModel
        The decoder; every weight is read once, the input embedding not at all.
    rows, tokens, filled : int
        N, tokens of the window, and pairs in every head's cache before it.
    """
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = model.get_output_embeddings().weight
    inner = sum(x.numel() for x in model.parameters()) - head.numel()
    if model.get_input_embeddings().weight is not head:
        inner -= head.numel()
    multiplied = inner + head.numel()
    pairs = rows * config.num_hidden_layers * config.num_key_value_heads * filled * head_dim
    attended = rows * tokens * (filled + tokens) * config.num_attention_heads * head_dim * config.num_hidden_layers
    return (multiplied + 2 * pairs) * head.element_size(), 2 * rows * tokens * multiplied + 4 * attended


def _random(device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps it without types
    return model
