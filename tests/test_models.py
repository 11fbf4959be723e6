"""Loading LLMs: once per process, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from kvenv import attention, registry
from kvenv.models import LoadedModel, load_model, refuse_unsupported
from tests.models import random_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a random model and the bundled tokenizer."""
    from transformers import AutoTokenizer

    from kvenv.models import TINY

    random_model("llama", torch.float32, seed=1).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A model registered as "mine", forgotten afterwards."""
    monkeypatch.setattr(registry.MODELS, "_values", dict(registry.MODELS._values))
    model = random_model("qwen2", torch.float32, seed=1)
    registry.register_model("mine", model, None)
    return model


def test_a_directory_is_loaded_once_per_process(directory: Path) -> None:
    loaded = load_model(str(directory))
    assert load_model(str(directory), dtype="float32", device="cpu") is loaded
    double = load_model(str(directory), dtype="float64")
    assert double is not loaded
    assert double.model.dtype == torch.float64
    assert loaded.name == str(directory)
    assert loaded.tokenizer is not None
    assert loaded.model.config._attn_implementation == attention.NAME
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    weight = random_model("llama", torch.float32, seed=1).lm_head.weight
    assert torch.equal(loaded.model.lm_head.weight, weight)


def test_a_registered_model_is_used_as_it_is(registered: PreTrainedModel) -> None:
    loaded = load_model("mine")
    assert loaded.model is registered
    assert loaded.tokenizer is None
    assert load_model("mine").model is registered


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_missing_files_are_named(directory: Path, missing: str) -> None:
    (directory / missing).unlink()
    with pytest.raises(ValueError, match=f"lacks {missing}"):
        load_model(str(directory))


@pytest.mark.parametrize("broken", ["config.json", "tokenizer.json", "model.safetensors"])
def test_broken_files_are_an_error_that_names_the_model(directory: Path, broken: str) -> None:
    path = directory / broken
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"model '{directory}' can't be loaded: "):
        load_model(str(directory))


def test_a_missing_tokenizer_is_an_error_that_names_the_model(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"model '{directory}' can't be loaded: .*tokenizer"):
        load_model(str(directory))


def test_missing_weights_are_not_made_up(directory: Path) -> None:
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"its weights lack \d+ tensors, e\.g\. model\.layers\.2\."):
        load_model(str(directory))


def test_pickled_weights_are_not_read(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "adapter.safetensors")
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"can't be loaded: .*safetensors"):
        load_model(str(directory))


def test_unknown_names_dtypes_and_devices_list_the_known(registered: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"unknown model 'tinny': known are tiny, .*mine, a directory or a hub id"):
        load_model("tinny")
    with pytest.raises(ValueError, match="dtype 'int8' is unknown: known are float64, float32, bfloat16, float16"):
        load_model("tiny", dtype="int8")
    with pytest.raises(ValueError, match="device 'abacus' is unknown"):
        load_model("tiny", device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' isn't available"):
            load_model("tiny", device="cuda")


def config(architecture: str, **settings: object) -> PreTrainedConfig:
    """Return a default configuration with some settings."""
    return AutoConfig.for_model(architecture, **settings)


@pytest.mark.parametrize(
    ("unsupported", "reason"),
    [
        (config("deepseek_v3"), "latent attention"),
        (config("qwen3_next"), "linear-attention"),
        (config("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"]), "linear-attention"),
        (config("bamba"), "linear-attention"),
        (config("gemma2"), "soft-capped"),
        (config("cohere"), "scaled"),
        (config("granite", logits_scaling=8.0), "scaled"),
        (config("gpt2"), "no rotary"),
        (config("t5"), "encoder-decoder"),
        (config("mamba"), "state-space"),
    ],
    ids=lambda x: x.model_type if isinstance(x, PreTrainedConfig) else "",
)
def test_unsupported_architectures_are_refused_with_the_reason(unsupported: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"model 'x' \({unsupported.model_type}\) is not supported: .*{reason}"):
        refuse_unsupported("x", unsupported)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "phi3", "granite"])
def test_supported_architectures_pass(architecture: str) -> None:
    refuse_unsupported("x", config(architecture))


class _Bare:
    """A model of which only the configuration is asked."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config


@pytest.mark.parametrize(
    ("settings", "tokens", "message"),
    [
        ({"architecture": "qwen3", "max_position_embeddings": 64}, 64, None),
        ({"architecture": "qwen3", "max_position_embeddings": 64}, 65, "exceeds the 64 positions"),
        ({"architecture": "mistral", "sliding_window": 32}, 32, None),
        ({"architecture": "mistral", "sliding_window": 32}, 33, "sliding window of 32 tokens"),
        ({"architecture": "mistral", "sliding_window": None}, 33, None),
        ({"architecture": "qwen2", "sliding_window": 32, "use_sliding_window": False}, 33, None),
        (
            {"architecture": "qwen2", "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1},
            33,
            "sliding window of 32",
        ),
        (
            {
                "architecture": "llama",
                "max_position_embeddings": 256,
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            65,
            "rescales its rotary phases beyond 64 tokens",
        ),
        (
            {
                "architecture": "phi3",
                "max_position_embeddings": 256,
                "original_max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 48,
                    "long_factor": [2.0] * 48,
                },
            },
            65,
            "rescales its rotary phases beyond 64 tokens",
        ),
    ],
)
def test_too_long_traces_are_refused(settings: dict, tokens: int, message: str | None) -> None:
    loaded = LoadedModel("x", _Bare(config(**settings)), None)  # type: ignore[arg-type]
    if message is None:
        loaded.check_length(tokens)
    else:
        with pytest.raises(ValueError, match=message):
            loaded.check_length(tokens)
