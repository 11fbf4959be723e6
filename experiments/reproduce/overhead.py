"""What scoring pairs costs beside the LLM itself: parameters and multiplications, from the modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from agents.head_networks import HeadLinear
from agents.kvp import PRESETS, KVPConfig
from agents.kvp_scorer import KVPScorer
from experiments.bench.models import SHAPES
from kvenv.models import load_model


@dataclass(frozen=True)
class Overhead:
    """Scoring every new pair once, beside decoding a token.

    Attributes
    ----------
    parameters, agents : int
        Of all scorers together, and how many they are: one per (layer, KV head).
    scoring, decoding : float
        GFLOPs per token: two for every weight of a matrix that a token meets, attention left out.
    """

    parameters: int
    agents: int
    scoring: float
    decoding: float


def overhead(name: str) -> Overhead:
    """Return the overhead of kvp in a model: ``tiny``, by its defaults, or one of ``SHAPES``, with the paper's widths.

    Nothing is allocated for a shape.
    """
    if name == "tiny":
        loaded: Any = load_model("tiny").model
        return _overhead(loaded, KVPConfig())
    with torch.device("meta"):
        return _overhead(AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name])), PRESETS["kvp"])


def _overhead(model: Any, config: KVPConfig) -> Overhead:
    shape = model.config
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    layers, heads = shape.num_hidden_layers, shape.num_key_value_heads
    with torch.device("meta"):
        scorer = KVPScorer(layers, heads, head_dim, config.embedding, config.hidden, [1.0] * (head_dim // 2))
    linear = [module.weight.numel() for module in scorer.modules() if isinstance(module, HeadLinear)]
    decoding = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    parameters = sum(weight.numel() for weight in scorer.parameters())
    return Overhead(parameters, layers * heads, 2e-9 * sum(linear), 2e-9 * decoding)
