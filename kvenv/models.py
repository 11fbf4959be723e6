"""Loading LLMs: the bundled one, a directory, a hub id or a registered model, once per process."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file, logging

from kvenv import identity
from kvenv.attention import use_kvenv_attention
from kvenv.registry import HUB_ID, MODELS

TINY = Path(__file__).parent / "tiny"
"""Directory of the bundled LLM."""

_SHARD = re.compile(r"\w[\w.-]*\.safetensors")
_INDEX = re.compile(r"\w[\w.-]*\.safetensors\.index\.json")

KEPT = 8
"""Loaded models that a process keeps, those asked for last."""

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A frozen LLM with its tokenizer, on kvenv's attention.

    Attributes
    ----------
    name : str
        What it was asked for by.
    model : PreTrainedModel
        In eval mode, gradients off.
    tokenizer : PreTrainedTokenizerBase or None
        None if a registered model came without.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    def check_length(self, tokens: int, what: str = "trace_length") -> None:
        """Refuse more tokens than the model has positions or than its attention reaches.

        Raises
        ------
        ValueError
            Naming what is too short.
        """
        config = self.model.config.get_text_config()
        check_positions(self.model, tokens, self.name, what)
        window = _sliding_window(config)
        if window is not None and window < tokens:
            raise ValueError(
                f"model {self.name!r} attends over a sliding window of {window} tokens, shorter than {what} "
                f"{tokens}: kvenv needs full attention over all"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope.get("rope_type") in ("dynamic", "longrope") and tokens > original:
            raise ValueError(
                f"model {self.name!r} rescales its rotary phases beyond {original} tokens, which would turn cached "
                f"keys stale: {what} {tokens} must not exceed it"
            )


def check_positions(model: PreTrainedModel, tokens: int, name: str, what: str = "trace_length") -> None:
    """Refuse more tokens than the model has positions.

    Raises
    ------
    ValueError
        Naming both.
    """
    positions = model.config.get_text_config().max_position_embeddings
    if tokens > positions:
        raise ValueError(f"{what} {tokens} exceeds the {positions} positions of model {name!r}")


def check_tokens(
    model: PreTrainedModel, tokens: Sequence[int] | np.ndarray, what: str, name: str | None = None
) -> None:
    """Refuse tokens that a model doesn't know.

    Raises
    ------
    ValueError
        Naming them and what it knows.
    """
    smallest, largest = int(np.min(tokens)), int(np.max(tokens))
    known = model.config.get_text_config().vocab_size
    if smallest < 0 or largest >= known:
        raise ValueError(
            f"{what} has token ids {smallest} to {largest}: model {(name or type(model).__name__)!r} knows 0 to "
            f"{known - 1}; is the tokenizer another model's?"
        )


def load_model(
    name: str = "tiny",
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal LM and its tokenizer, or return the copy this process already has.

    The process keeps those of the last :data:`KEPT` different calls, and a registered one for as long as it runs; what
    else was loaded goes when nobody refers to it any more.

    Parameters
    ----------
    name : str
        "tiny" (the bundled LLM), a registered name, a directory in Hugging Face format, or a hub id "owner/name".
    dtype : str
        "float32", "bfloat16", "float16" or "float64". A registered model keeps its own.
    device : str
        E.g. "cpu" or "cuda". A registered model stays where it is.
    revision : str, optional
        Commit or tag of a hub id.
    trust_remote_code : bool
        Passed on to transformers; runs code from the hub if True.

    Returns
    -------
    LoadedModel

    Raises
    ------
    ValueError
        If the name is unknown, files are missing, the dtype or device is unknown, or the architecture isn't supported.
    """
    if not isinstance(name, str):
        raise ValueError(
            f"model must be a name, not {type(name).__name__}: give a loaded one a name with kvenv.register_model"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: known are {', '.join(DTYPES)}")
    if name in MODELS:
        model, tokenizer = MODELS.get(name)
        return _prepare(name, model, tokenizer)
    return _load(name, dtype, _device(device), revision, trust_remote_code)


def _device(device: str) -> str:
    """Return a device's name; refuse one that can't hold a number."""
    try:
        known = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is unknown: use e.g. cpu or cuda") from error
    try:
        torch.zeros(1, device=known).item()
    except (RuntimeError, AssertionError) as error:  # PyTorch made without it asserts
        raise ValueError(f"device {device!r} isn't available here: use cpu") from error
    return str(known)


@lru_cache(maxsize=KEPT)
def _load(name: str, dtype: str, device: str, revision: str | None, trust_remote_code: bool) -> LoadedModel:
    """Load from disk or hub; the process-level cache."""
    source = _resolve(name)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _read(AutoConfig, name, source, **options)
    refuse_unsupported(name, config)
    tokenizer = _read(AutoTokenizer, name, source, **options)
    _refuse_foreign_weights(name, source, revision, getattr(config, "transformers_weights", None))
    # Safetensors only: other weights are pickles. SDPA: a configuration may name a kernel, compiled code from the hub.
    options |= {"dtype": DTYPES[dtype], "use_safetensors": True, "attn_implementation": "sdpa"}
    options |= {"output_loading_info": True}
    with no_progress_bar() if name == "tiny" else nullcontext():
        model, report = _read(AutoModelForCausalLM, name, source, **options)
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise ValueError(f"model {name!r} can't be loaded: its weights lack {len(missing)} tensors, e.g. {missing[0]}")
    return _prepare(name, model.to(device), tokenizer)


def _refuse_foreign_weights(name: str, source: str, revision: str | None, given: object) -> None:
    """Refuse pickles and files elsewhere, which transformers would open where an index or a configuration names them.

    ``given`` is what the configuration calls the weights, or their index; None if they have their usual name.
    """
    index = SAFE_WEIGHTS_INDEX_NAME if given is None else str(given)
    if _INDEX.fullmatch(index):
        teller, named = index, _shards(name, source, revision, index)
    else:
        teller, named = "config.json", {index}
    if foreign := sorted(file for file in named if not _SHARD.fullmatch(file)):
        raise ValueError(
            f"model {name!r} can't be loaded: {teller} names {foreign[0]!r}, and only safetensors beside it are read"
        )


def _shards(name: str, source: str, revision: str | None, index: str) -> set[str]:
    """Return the files that an index of weights names, none where there is no index."""
    try:
        path = cached_file(source, index, revision=revision)
    except OSError:  # the weights are in one file
        return set()
    try:
        return {str(file) for file in json.loads(Path(str(path)).read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model {name!r} can't be loaded: {index} is damaged: {error}") from error


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Silence transformers' bar: for a model that loads at once it only stands between the lines of a program."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _read(kind: Any, name: str, source: str, **options: Any) -> Any:
    """Return ``kind.from_pretrained(source)``; what keeps it from being read becomes an error that names the model."""
    try:
        return kind.from_pretrained(source, **options)
    except Exception as error:  # transformers raises many kinds for files that aren't a model's
        raise ValueError(f"model {name!r} can't be loaded: {' '.join(str(error).split())}") from error


def _resolve(name: str) -> str:
    """Return the directory or hub id that a name means."""
    directory = TINY if name == "tiny" else Path(name)
    if os.path.isdir(directory):  # unlike Path's, it takes any name
        missing = [file for file in ("config.json", "tokenizer_config.json") if not (directory / file).is_file()]
        if not list(directory.glob("*.safetensors")):
            missing.append("model.safetensors")
        if missing:
            raise ValueError(f"model directory {str(directory)!r} lacks {', '.join(missing)}")
        return str(directory)
    if HUB_ID.fullmatch(name):
        return name
    known = ["tiny", *MODELS.names()]
    raise ValueError(f"unknown model {name!r}: known are {', '.join(known)}, a directory or a hub id owner/name")


def _prepare(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> LoadedModel:
    """Freeze a model and switch it to kvenv's attention, once."""
    refuse_unsupported(name, model.config)
    model.eval().requires_grad_(False)
    use_kvenv_attention(model)
    identity.names[model] = name
    return LoadedModel(name, model, tokenizer)


def refuse_unsupported(name: str, config: PretrainedConfig) -> None:
    """Refuse architectures whose cache isn't one rotated key and one value per KV head and token.

    Raises
    ------
    ValueError
        With the reason.
    """
    text = config.get_text_config()
    reasons = {
        "it is an encoder-decoder": getattr(config, "is_encoder_decoder", False),
        "its latent attention (MLA) caches no per-head keys": getattr(text, "kv_lora_rank", None),
        "it has linear-attention, state-space or other special layers": _layer_types(text)
        - {"full_attention", "sliding_attention", "attention"}
        or getattr(text, "state_size", None),  # older transformers name no layer types of Mamba
        "its logits are soft-capped": getattr(text, "attn_logit_softcapping", None)
        or getattr(text, "final_logit_softcapping", None),
        "its logits are scaled after the head": {
            getattr(text, factor, None) for factor in ("logit_scale", "logits_scaling", "lm_head_multiplier")
        }
        - {None, 1},
        "it has no rotary position embedding": not getattr(text, "rope_parameters", None),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"model {name!r} ({config.model_type}) is not supported: {reason}")


def _layer_types(config: PretrainedConfig) -> set[str]:
    """Return the kinds of layers that a configuration names."""
    return set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())


def _sliding_window(config: PretrainedConfig) -> int | None:
    """Return the window of the layers that slide, None if all attend fully."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)
