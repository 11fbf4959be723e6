"""A step of the vector environment against the bare model's forward of the same tokens, and what its parts take."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from experiments.bench.machine import measure
from experiments.bench.measure import Row, Side, Times, alternate, compare
from experiments.bench.models import RANDOM, large, register_random_traces, work
from kvenv.attention import CACHE
from kvenv.features import feature_set
from kvenv.graphs import Graphs
from kvenv.models import LoadedModel, load_model
from kvenv.ranking import eviction_order
from kvenv.registry import REWARDS
from kvenv.vector_env import KVEvictVectorEnv

ROWS, BUDGET, INTERVAL = 16, 64, 16
TARGETS = {"tiny": {"kv": 1.15, "foresight": 1.4}, "100m": {"kv": 1.05, "foresight": 1.15}}


def rows(device: str) -> Iterator[Row]:
    """Measure."""
    machine = measure(device)
    for case, loaded, repeats in (("tiny", load_model("tiny", device=device), 40), ("100m", large(device), 8)):
        times = run(loaded, repeats, device)
        tokens, floor = ROWS * INTERVAL, machine.floor(*work(loaded.model, ROWS, INTERVAL, BUDGET))
        for features, bound in TARGETS[case].items():
            yield compare("step", case, times, f"step, {features}", "bare forward", target=f"<= {bound}", floor=floor)
        yield compare("step", case, times, "step, kv", "bare forward", amount=tokens, floor=floor)
        yield compare("step", case, times, "bare eager", "bare forward", floor=floor)
        for part in ("features, kv", "features, foresight", "ranking", "eviction", "reward"):
            yield compare("step", case, times, part, "step, foresight")
        if device.startswith("cuda"):
            yield from captured(case, loaded, repeats, floor, device)


def run(loaded: LoadedModel, repeats: int, device: str) -> Times:
    """Return the seconds of steps with both feature sets, of the bare forward, and of a step's parts."""
    envs = {features: environment(loaded, features, repeats) for features in ("kv", "foresight")}
    prompt = torch.randint(0, loaded.model.config.vocab_size, (ROWS, BUDGET + INTERVAL), device=device)
    sides = {f"step, {features}": stepping(env) for features, env in envs.items()}
    sides["bare forward"] = bare_forward(loaded.model, prompt, BUDGET, "sdpa")
    sides["bare eager"] = bare_forward(loaded.model, prompt, BUDGET, "eager")
    times = alternate(sides | parts(envs["foresight"]), repeats, device=device)
    for env in envs.values():
        env.close()
    return times


def captured(case: str, loaded: LoadedModel, repeats: int, floor: float, device: str) -> Iterator[Row]:
    """Measure steps and the bare forward in CUDA graphs, and what it took to capture a step and an observation."""
    envs = {features: environment(loaded, features, repeats, cuda_graph=True) for features in TARGETS[case]}
    prompt = torch.randint(0, loaded.model.config.vocab_size, (ROWS, BUDGET + INTERVAL), device=device)
    sides = {f"step, {features}, captured": stepping(env) for features, env in envs.items()}
    sides["bare forward, captured"] = captured_forward(bare_copy(loaded.model, "sdpa"), prompt, BUDGET)
    times = alternate(sides, repeats, device=device)
    for features, env in envs.items():
        yield compare("step", case, times, f"step, {features}, captured", "bare forward, captured", floor=floor)
        if (graphs := env.dynamics.graphs) is not None:
            yield Row("step", case, f"warm-up, {features}", 1e3 * graphs.warm_up_seconds, "ms")
            yield Row("step", case, f"capture, {features}", 1e3 * graphs.capture_seconds, "ms")
        env.close()


def environment(loaded: LoadedModel, features: str, steps: int, cuda_graph: bool = False) -> KVEvictVectorEnv:
    """Return an environment that was reset and has so many steps to go, and some to warm up."""
    register_random_traces()
    env = KVEvictVectorEnv(
        num_envs=ROWS, model=loaded.name, traces=RANDOM, budget=BUDGET, interval=INTERVAL, features=features,
        output="torch", autoreset_mode="SameStep", trace_length=BUDGET + INTERVAL * (steps + 6),
        device=str(loaded.model.device), cuda_graph=cuda_graph,
    )  # fmt: skip
    env.reset(seed=0)
    return env


def stepping(env: KVEvictVectorEnv) -> Side:
    """Return a step under one random action."""
    env.action_space.seed(0)
    action = torch.as_tensor(env.action_space.sample(), device=env.dynamics.model.device)
    return lambda: env.step(action)


def parts(env: KVEvictVectorEnv) -> dict[str, Side]:
    """Return what a step does beside decoding, each part alone, on the environment's state."""
    cache, held = env.dynamics.cache, env.dynamics.cache.positions
    priorities = torch.rand(held.shape, device=held.device)
    window, _ = env.dynamics.advance(priorities)
    active = torch.ones(ROWS, dtype=torch.bool, device=held.device)
    before = held.clone()

    def evict() -> Tensor:
        held.copy_(before)
        return cache.evict(priorities, active, INTERVAL)

    return {
        "features, kv": lambda: feature_set("kv").observe(cache),
        "features, foresight": lambda: feature_set("foresight").observe(cache),
        "ranking": lambda: eviction_order(priorities, held, cache.candidates()),
        "eviction": evict,
        "reward": lambda: REWARDS.get("lm_loss")(window),
    }


def bare_forward(model: PreTrainedModel, tokens: Tensor, filled: int, attention: str) -> Side:
    """Return a forward of the last columns over a full cache of the first ``filled``, with logits and NLL."""
    bare = bare_copy(model, attention)
    window, cache = tokens[:, filled:], cached(bare, tokens[:, :filled])

    @torch.no_grad()
    def forward() -> Tensor:
        nll = losses(bare, window, cache)
        cache.crop(-window.shape[1])
        return nll

    return forward


def captured_forward(bare: PreTrainedModel, tokens: Tensor, filled: int) -> Side:
    """Return the same, captured in a CUDA graph, of a model on SDPA or on kvenv's attention, the same to this cache."""
    graphs = Graphs(tokens.device)
    window, cache = tokens[:, filled:], cached(bare, tokens[:, :filled])
    filled_layers = [vars(layer).copy() for layer in cache.layers]

    def forward() -> dict[str, Tensor]:
        # A crop would leave views of what the call made, but a graph reads pairs where they were when it was captured.
        for layer, before in zip(cache.layers, filled_layers, strict=True):
            vars(layer).update(before)
        return {"nll": losses(bare, window, cache)}

    return lambda: graphs.run("forward", forward)["nll"]


@torch.no_grad()
def cached(bare: PreTrainedModel, tokens: Tensor) -> DynamicCache:
    """Return a cache of tokens."""
    cache = DynamicCache(config=bare.config)
    bare(tokens, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    return cache


def losses(bare: PreTrainedModel, window: Tensor, cache: DynamicCache) -> Tensor:
    """Return the NLL of a window over a cache, which grows by it."""
    logits = bare(window, use_cache=True, **{CACHE: cache}).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), window.flatten(), reduction="none")


def bare_copy(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """Return the model with its own weights on one of transformers' attentions."""
    bare = copy.deepcopy(model)
    bare.set_attn_implementation(attention)
    return bare.eval()
