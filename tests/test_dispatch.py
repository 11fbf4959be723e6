"""What a warm step of the vector environment asks of the device: no read-back, no copy, no new storage."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

import kvenv
from kvenv.registry import MODELS
from kvenv.vector_env import KVEvictVectorEnv
from tests.environments import RAGGED

READ_BACK = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
"""Operations whose result the host needs to go on, or whose shape depends on data."""

COPIES = ("_to_copy", "_copy_from", "_pin_memory", "lift_fresh")


class Watch(TorchDispatchMode):
    """Counts operations and remembers those that cross devices or ask the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.offences: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note the operation and run it."""
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        self.count[name] += 1
        if name in READ_BACK:
            self.offences.append(name)
        if name in COPIES and args[0].device != result.device:
            self.offences.append(f"{name} from {args[0].device} to {result.device}")
        # A tensor made of host data is a copy to the device wherever the device isn't the host.
        if name == "lift_fresh":
            self.offences.append(name)
        # Indexing by a bool tensor is a hidden nonzero.
        by_index = name in ("index", "index_put", "index_put_")
        if by_index and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.offences.append(f"{name} with a bool tensor")
        return result


def model(kv_heads: int) -> str:
    """Register a model with that many KV heads and return its name."""
    name = f"dispatch-{kv_heads}"
    if name not in MODELS:
        config = Qwen3Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2 * kv_heads,
            num_key_value_heads=kv_heads,
            head_dim=8,
            max_position_embeddings=1024,
        )
        kvenv.register_model(name, Qwen3ForCausalLM(config))
    return name


def warm_step(
    features: str, reward: str = "lm_loss", *, kv_heads: int = 2, num_envs: int = 2, trace_length: int = 80
) -> tuple[Watch, KVEvictVectorEnv]:
    """Watch the second step of an environment on tensors."""
    env = KVEvictVectorEnv(
        num_envs,
        model=model(kv_heads),
        traces=RAGGED,
        trace_length=trace_length,
        budget=20,
        interval=6,
        sinks=2,
        recent=4,
        features=features,
        reward=reward,
        output="torch",
    )
    env.reset(seed=0)
    actions = torch.rand(env.action_space.shape) * 2 - 1
    env.step(actions)
    storage = [tensor.data_ptr() for tensor, _ in env.dynamics.cache.row_tensors().values()]
    with Watch() as watch:
        env.step(actions)
    assert [tensor.data_ptr() for tensor, _ in env.dynamics.cache.row_tensors().values()] == storage
    return watch, env


@pytest.mark.parametrize("reward", ["lm_loss", "foresight"])
@pytest.mark.parametrize("features", ["kv", "foresight", "stats"])
def test_a_warm_step_asks_the_device_nothing(features: str, reward: str) -> None:
    watch, _ = warm_step(features, reward)
    assert watch.offences == []
    assert watch.count["scatter_"] >= 2, "the step evicted nothing, so the test tests nothing"


@pytest.mark.parametrize("features", ["kv", "foresight", "stats"])
def test_the_number_of_operations_depends_on_no_size(features: str) -> None:
    base, _ = warm_step(features)
    for size in ({"kv_heads": 4}, {"num_envs": 5}, {"trace_length": 400}):
        other, _ = warm_step(features, **size)
        assert other.count == base.count, f"{size}: {other.count - base.count} more, {base.count - other.count} fewer"


def test_the_watch_sees_what_it_must() -> None:
    with Watch() as watch:
        x = torch.arange(4)
        int(x[1])
        x[x > 1]
        x.nonzero()
        torch.tensor([1])
    assert {"_local_scalar_dense", "index with a bool tensor", "nonzero", "lift_fresh"} <= set(watch.offences)
