"""Layer-by-layer rollouts against stepping, against the bare model fed window by window, and compiled windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import agents
from experiments.bench.machine import measure
from experiments.bench.measure import Row, Side, alternate, compare
from experiments.bench.models import work
from experiments.bench.step import bare_copy
from kvenv.attention import CACHE
from kvenv.cache import SlotCache
from kvenv.decode import collate, feed
from kvenv.expert import policy_action
from kvenv.layerwise import Policy, Rollout, rollout
from kvenv.models import LoadedModel, load_model
from kvenv.traces import Trace, load_traces
from kvenv.vector_env import KVEvictVectorEnv

TOKENS, BUDGET, INTERVAL = 512, 64, 16
CHUNKED = {1: 7_800, 16: 29_000}
"""Tokens per second of the bare chunked forward on the machine where the authors' code was measured, by rows ..."""
AUTHORS = {1: 4_200, 16: 15_700}
"""... and of the rollout of ForesightKV's authors there: their code can't be had here, so that figure is scaled."""
TIMES_AUTHORS = {1: {"imitation-tiny": 2.5, "keydiff": 4.0}, 16: {"imitation-tiny": 2.0, "keydiff": 2.0}}
TIMES_STEPPING = {1: 1.7, 16: 1.0}


def rows(device: str) -> Iterator[Row]:
    """Measure the bundled model, with a learned policy that sees statistics and a heuristic that needs none."""
    machine, loaded = measure(device), load_model("tiny", device=device)
    source = load_traces("recall", split="test", tokenizer=loaded.tokenizer, trace_length=TOKENS)
    for count in (1, 16):
        traces = [source[i] for i in range(count)]
        sides: dict[str, Side] = {"chunked forward": chunked_forward(loaded.model, traces)}
        for name in TIMES_AUTHORS[count]:
            policy = agents.make(name)
            sides[f"rollout, {name}"] = rolling(policy, loaded, traces)
            sides[f"stepping, {name}"] = stepping(policy, loaded, count, device)
            sides[f"compiled windows, {name}"] = compiled_windows(policy, loaded, traces)
        times = alternate(sides, 9, warmup=1, device=device)
        tokens, case = count * (TOKENS - 1), f"N = {count}"
        # Weights are read once, windows are computed one by one.
        moved, computed = work(loaded.model, count, INTERVAL, BUDGET)
        floor = machine.floor(moved, computed * (TOKENS - 1) / INTERVAL)
        authors = np.median(times["chunked forward"]) * CHUNKED[count] / AUTHORS[count]
        times["authors' rollout, scaled"] = np.full_like(times["chunked forward"], authors)
        for name, bound in TIMES_AUTHORS[count].items():
            ours = f"rollout, {name}"
            scaled = "authors' rollout, scaled"
            yield compare("rollout", case, times, ours, scaled, amount=tokens, target=f">= {bound}", floor=floor)
            stepped = f">= {TIMES_STEPPING[count]}"
            yield compare("rollout", case, times, ours, f"stepping, {name}", amount=tokens, target=stepped)
            yield compare("rollout", case, times, ours, "chunked forward", amount=tokens)
            yield compare("rollout", case, times, f"compiled windows, {name}", ours, amount=tokens)


def rolling(policy: Policy, loaded: LoadedModel, traces: list[Trace]) -> Callable[[], Rollout]:
    """Return a rollout of traces."""
    return lambda: rollout(policy, traces, model=loaded.model, budget=BUDGET, interval=INTERVAL)


def stepping(policy: Policy, loaded: LoadedModel, count: int, device: str) -> Side:
    """Return the same by steps of the vector environment: reset, then every decision."""
    env = KVEvictVectorEnv(
        num_envs=count, model=loaded.name, budget=BUDGET, interval=INTERVAL, features="stats", output="torch",
        split="test", autoreset_mode="Disabled", trace_length=TOKENS, device=device,
    )  # fmt: skip
    env.track(policy.needs - {"noise"})
    windows = -(-(TOKENS - 1 - BUDGET - INTERVAL) // INTERVAL)

    def run() -> None:
        env.reset(seed=0, options={"trace": list(range(count))})
        for _ in range(windows):
            env.step(policy_action(env, policy))

    return run


def compiled_windows(policy: Policy, loaded: LoadedModel, traces: list[Trace]) -> Side:
    """Return the rollout window by window, each an eviction and a forward call, compiled as a whole."""
    model = loaded.model
    batch = collate(
        [trace.tokens for trace in traces],
        prompt_lengths=[trace.prompt_length for trace in traces],
        anchors=BUDGET + INTERVAL,
        interval=INTERVAL,
        device=model.device,
    )

    @torch.no_grad()
    def window(cache: SlotCache, *fed: Tensor) -> Tensor:
        return feed(model, cache, *fed).nll

    on_cpu = model.device.type == "cpu"
    options: dict[str, Any] = {"freezing": True, "cpp_wrapper": True} if on_cpu else {"triton.cudagraphs": True}
    compiled = torch.compile(window, dynamic=False, fullgraph=True, options=options)
    fed = (batch.tokens, batch.targets, batch.positions, batch.valid)

    def run() -> Tensor:
        cache = SlotCache(
            model, rows=len(traces), capacity=BUDGET + INTERVAL, interval=INTERVAL, budget=BUDGET, policy=policy
        )
        cache.prompt_length.copy_(batch.prompt_length)
        parts = zip(*(x.split(INTERVAL, dim=1) for x in fed), strict=True)
        return torch.cat([compiled(cache, *part) for part in parts], dim=1)

    plain = rolling(policy, loaded, traces)()
    torch.testing.assert_close(batch.by_position(run(), TOKENS - 1), plain.losses.nll, rtol=1e-3, atol=1e-3)
    return run


def chunked_forward(model: PreTrainedModel, traces: list[Trace]) -> Side:
    """Return the bare model fed a window at a time over a cache cut to the budget: what eviction can't be faster than
    where windows are decoded one by one."""
    bare = bare_copy(model, "sdpa")
    tokens = torch.as_tensor(np.stack([trace.tokens for trace in traces]), device=model.device)

    @torch.no_grad()
    def run() -> None:
        cache = DynamicCache(config=bare.config)
        for start in range(0, TOKENS - 1, INTERVAL):
            window = tokens[:, start : min(start + INTERVAL, TOKENS - 1)]
            logits = bare(window, use_cache=True, **{CACHE: cache}).logits
            targets = tokens[:, start + 1 : start + 1 + window.shape[1]]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
            if cache.get_seq_length() > BUDGET:
                cache.crop(BUDGET - cache.get_seq_length())

    return run
