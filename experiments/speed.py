"""How fast the environment steps on this machine, beside the bare forward of the same tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from transformers import DynamicCache

from kvenv.attention import CACHE
from kvenv.models import LoadedModel
from kvenv.vector_env import KVEvictVectorEnv


@dataclass(frozen=True)
class Speed:
    """Medians of alternating measurements.

    Attributes
    ----------
    steps_per_second : float
        Steps of single environments: vector steps times rows.
    tokens_per_second : float
        Tokens decoded inside the environment.
    ratio : float
        Time of a vector step over that of a bare forward of the same tokens at the same cache length, logits and NLL
        included.
    """

    steps_per_second: float
    tokens_per_second: float
    ratio: float


def measure(loaded: LoadedModel, *, rows: int = 16, budget: int = 64, interval: int = 16, repeats: int = 20) -> Speed:
    """Time random eviction in the vector environment (``kv`` features) against the bare model, alternating.

    Parameters
    ----------
    loaded : LoadedModel
        The LLM; the environment uses the same object.
    rows, budget, interval : int
        N, B, W.
    repeats : int
        Timed pairs, after three to warm up.
    """
    env = KVEvictVectorEnv(
        num_envs=rows, model=loaded.name, budget=budget, interval=interval, features="kv", output="torch",
        autoreset_mode="SameStep", trace_length=budget + interval * (repeats + 6),
    )  # fmt: skip
    env.reset(seed=0)
    action = torch.as_tensor(env.action_space.sample(), device=loaded.model.device)
    tokens = torch.randint(0, loaded.model.config.vocab_size, (rows, budget + interval), device=loaded.model.device)
    sides: tuple[Callable[[], object], ...] = (lambda: env.step(action), _bare_forward(loaded, tokens, budget))
    times: tuple[list[float], ...] = ([], [])
    for _ in range(repeats + 3):
        for side, taken in zip(sides, times, strict=True):
            began = time.perf_counter()
            side()
            if loaded.model.device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
    env.close()
    step, bare = (median(taken[3:]) for taken in times)
    return Speed(rows / step, rows * interval / step, step / bare)


def _bare_forward(loaded: LoadedModel, tokens: torch.Tensor, filled: int) -> Callable[[], torch.Tensor]:
    """Return a forward of the last columns over a full cache of the first ``filled``, logits and NLL included."""
    model, window = loaded.model, tokens[:, filled:]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :filled], use_cache=True, logits_to_keep=1, **{CACHE: cache})

    def forward() -> torch.Tensor:
        with torch.no_grad():
            logits = model(window, use_cache=True, **{CACHE: cache}).logits
            cache.crop(-window.shape[1])
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), window.flatten(), reduction="none")

    return forward
