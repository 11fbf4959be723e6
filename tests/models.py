"""Tiny random models of every supported architecture: seconds to test, nothing to download."""

from __future__ import annotations

from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "phi3")


@cache
def random_model(
    architecture: str = "qwen3", dtype: torch.dtype = torch.float64, *, layers: int = 2, seed: int = 0
) -> PreTrainedModel:
    """Return a frozen random model, the same object for the same arguments.

    Two layers, four query heads over two KV heads, vocabulary 64, 2,048 positions. The initial weights are large, so
    that attention is far from uniform and evicting the wrong pair shows.

    Parameters
    ----------
    architecture : str
        One of ``ARCHITECTURES``, transformers' ``model_type``.
    dtype : torch.dtype
        float64 by default: the invariants hold to 1e-9 there.
    layers, seed : int
        Number of layers; seed of the weights.
    """
    settings: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if architecture == "qwen3":
        settings["head_dim"] = 16  # more than hidden_size / heads: nobody may derive one from the other
    if architecture == "mistral":
        settings["sliding_window"] = None
    if architecture == "phi3":
        settings["original_max_position_embeddings"] = 2048
    config = AutoConfig.for_model(architecture, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if "q_norm" in name:  # Qwen3 normalises queries and keys: weights of 1 would leave attention nearly uniform
            torch.nn.init.constant_(parameter, 3.0)
    if dtype is torch.float64:
        _norms_in_float64(model)
    return model.eval().requires_grad_(False)


def _norms_in_float64(model: PreTrainedModel) -> None:
    """Replace the RMSNorms: all round to float32, which hides differences or blows a last bit up to 1e-8."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=torch.float64)
                norm.weight = module.weight
                setattr(parent, name, norm)


def random_tokens(rows: int, length: int, *, vocabulary: int = 64, seed: int = 0) -> torch.Tensor:
    """Return token ids (rows, length), int64, reproducibly."""
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
