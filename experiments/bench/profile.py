"""Where time goes beyond what it is compared with: operations of a step, a rollout and of generating, by PyTorch's
profiler."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

import agents
from experiments.bench import generate, rollout, step
from experiments.bench.measure import Row, Side
from kvenv.models import load_model
from kvenv.traces import load_traces

SHOWN = 12
"""Operations shown of each case: those that take most more than in the baseline."""
CALLS, NEW, BUDGET = 3, 64, 64


def rows(device: str) -> Iterator[Row]:
    """Profile on the bundled model what the sections ``step``, ``rollout`` and ``generate`` measure."""
    loaded = load_model("tiny", device=device)
    env = step.environment(loaded, "kv", 2 * CALLS)
    prompt = torch.randint(0, loaded.model.config.vocab_size, (step.ROWS, step.BUDGET + step.INTERVAL), device=device)
    bare = step.bare_forward(loaded.model, prompt, step.BUDGET, "sdpa")
    yield from differences("step, kv / bare forward", step.stepping(env), bare, device)
    env.close()
    source = load_traces("recall", split="test", tokenizer=loaded.tokenizer, trace_length=rollout.TOKENS)
    policy = agents.make(generate.POLICY)
    for count in (1, 16):
        traces = [source[i] for i in range(count)]
        case = f"rollout, {policy.name}, N = {count} / chunked forward"
        ours, chunked = rollout.rolling(policy, loaded, traces), rollout.chunked_forward(loaded.model, traces)
        yield from differences(case, ours, chunked, device)
    prompt, plain = prompt[:1, : generate.PROMPT], step.bare_copy(loaded.model, "sdpa")
    sides = generate.ours(loaded.model, prompt, NEW, BUDGET, generate.INTERVALS[BUDGET])
    case = f"generate, eager, {BUDGET}, {NEW} tokens / full cache"
    yield from differences(case, sides["eager"], lambda: generate.generate(plain, prompt, NEW), device)


def differences(case: str, ours: Side, baseline: Side, device: str) -> Iterator[Row]:
    """Show milliseconds per call in all, and of the operations that take most more than in the baseline."""
    mine, theirs = (operations(side, device) for side in (ours, baseline))
    more = sorted(mine, key=lambda name: theirs.get(name, 0.0) - mine[name])
    yield Row("profile", case, "all", sum(mine.values()), "ms", sum(theirs.values()))
    for name in more[:SHOWN]:
        yield Row("profile", case, name, mine[name], "ms", theirs.get(name, 0.0))


def operations(side: Side, device: str) -> dict[str, float]:
    """Return the milliseconds of each operation per call, without those that it calls."""
    cuda = device.startswith("cuda")
    for _ in range(2):
        side()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiled:
        for _ in range(CALLS):
            side()
    measured = "self_device_time_total" if cuda else "self_cpu_time_total"
    return {event.key: getattr(event, measured) / 1e3 / CALLS for event in profiled.key_averages()}
