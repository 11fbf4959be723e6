"""What a long process does with environments, rollouts, generation and models, over and over.

Every phase makes what it uses, plays about as many steps as it is asked for, drops all, and says how many steps it
made. A step is one decision of one trace.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from transformers import AutoConfig, AutoModelForCausalLM

import agents
import kvenv
from agents.base import Policy
from kvenv.attention import use_kvenv_attention
from kvenv.golden import future_attention
from kvenv.identity import fingerprint
from kvenv.models import KEPT, TINY, no_progress_bar
from kvenv.traces import FAMILIES

LENGTH, BUDGET, INTERVAL, PROTECTED = 96, 24, 8, {"sinks": 4, "recent": 8}
FEATURES = ("kv", "foresight", "pre-rope", "stats")
MODES = ("NextStep", "SameStep", "Disabled")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "phi3")
ROWS = 8


@dataclass(frozen=True)
class Round:
    """One pass through all phases.

    Attributes
    ----------
    number : int
        Of the round.
    steps : int
        About how many steps a phase shall make.
    directory : Path
        For files; has ``store``, a trace store.
    device : str
        Where models are.
    """

    number: int
    steps: int
    directory: Path
    device: str

    @property
    def terms(self) -> dict[str, Any]:
        """Arguments of an environment."""
        decoding = {"traces": "+".join(FAMILIES), "trace_length": LENGTH, "budget": BUDGET, "interval": INTERVAL}
        return decoding | PROTECTED | {"device": self.device}


def single(now: Round) -> int:
    """Play one trace after another, each in an environment of its own, by chance, by h2o and by golden."""
    done = 0
    while done < now.steps:
        features = FEATURES[done % len(FEATURES)]
        env = gymnasium.make("KVEvict-v0", features=features, render_mode="ansi", full_metrics=True, **now.terms)
        inner: Any = env.unwrapped
        h2o, golden = agents.make("h2o"), kvenv.GoldenExpert(inner)
        for act in (env.action_space.sample, partial(kvenv.policy_action, inner, h2o), golden.action):
            env.reset(seed=now.number + done)
            inner.track(h2o.needs)
            over = False
            while not over:
                *_, terminated, truncated, _ = env.step(act())
                over = terminated or truncated
                done += 1
            env.render()
        env.close()
    return done


def vector(now: Round) -> int:
    """Play traces side by side in all autoreset modes, on arrays and on tensors, with budgets of their own."""
    return sum(_play(now, mode, output) for mode in MODES for output in ("numpy", "torch"))


def _play(now: Round, mode: str, output: str) -> int:
    """Play in one environment, some of its episodes truncated."""
    done, rng = 0, np.random.default_rng(now.number)
    env = gymnasium.make_vec(
        "KVEvict-v0", num_envs=ROWS, autoreset_mode=mode, output=output, reward="foresight", max_episode_steps=6,
        features=FEATURES[now.number % len(FEATURES)], **now.terms,
    )  # fmt: skip
    env.reset(seed=now.number, options={"budget": rng.integers(16, BUDGET + 1, ROWS)})
    env.action_space.seed(now.number)
    while done < now.steps / 6:
        action = env.action_space.sample()
        *_, terminated, truncated, info = env.step(torch.as_tensor(action) if output == "torch" else action)
        done += int(info["active"].sum())
        over = np.asarray(torch.as_tensor(terminated | truncated).cpu())
        if mode == "Disabled" and over.any():
            env.reset(options={"reset_mask": over})
    env.close()
    return done


def snapshots(now: Round) -> int:
    """Go back to snapshots of one environment, in it and in another one."""
    done = 0
    while done < now.steps:
        envs = [kvenv.KVEvictVectorEnv(ROWS, autoreset_mode="SameStep", **now.terms) for _ in range(2)]
        for env in envs:
            env.reset(seed=now.number)
        kept = [envs[0].snapshot()]
        for _ in range(12):
            envs[0].step(envs[0].action_space.sample())
            kept.append(envs[0].snapshot())
        for env, snapshot in zip(envs * 6, kept, strict=False):
            env.restore(snapshot)
            env.step(env.action_space.sample())
        done += 24 * ROWS
    return done


def heads(now: Round) -> int:
    """Play with one row per (trace, layer, KV head)."""
    done = 0
    inner = kvenv.KVEvictVectorEnv(ROWS, autoreset_mode="SameStep", features="stats", **now.terms)
    env = kvenv.HeadView(inner)
    env.reset(seed=now.number)
    while done < now.steps:
        env.step(env.action_space.sample())
        done += ROWS
    env.close()
    return done


def rank(now: Round) -> int:
    """Rank the pairs of a store, which is mapped anew for every 64 steps."""
    done = 0
    while done < now.steps:
        env = gymnasium.make("KVRank-v0", store=str(now.directory / "store"))
        for episode in range(64):
            env.reset(seed=now.number if episode == 0 else None)
            env.step(env.action_space.sample())
        env.close()
        done += 64
    return done


def rollouts(now: Round) -> int:
    """Roll traces out layer by layer under every policy that there is, learned ones loaded anew."""
    loaded = kvenv.load_model("tiny", device=now.device)
    source = kvenv.load_traces("recall", tokenizer=loaded.tokenizer, trace_length=LENGTH)
    names = [name for name in agents.names() if name != "golden-expected"]
    decisions = -(-(LENGTH - 1 - BUDGET - INTERVAL) // INTERVAL)
    rows = -(-now.steps // (decisions * len(names)))
    traces = [source[now.number * rows + row] for row in range(rows)]
    tokens, anchors = [trace.tokens for trace in traces], [BUDGET + INTERVAL] * rows
    future, *_ = future_attention(loaded.model, tokens, interval=INTERVAL, anchors=anchors)
    for name in names:
        terms: Any = {"model": loaded.model, "budget": BUDGET, "interval": INTERVAL, "future": future}
        kvenv.rollout(agents.make(name), traces, agreement=True, seed=now.number, **terms)
    return rows * decisions * len(names)


def generate(now: Round) -> int:
    """Let Hugging Face's ``generate`` fill evicting caches, greedily and by sampling; none of it counts as steps."""
    model = kvenv.load_model("tiny", device=now.device).model
    for name in ("h2o", "random", "imitation-tiny", "expected-attention"):
        for schedule in ("periodic", "prefill"):
            _generate(model, name, schedule, do_sample=schedule == "periodic")
    return 0


def _generate(model: Any, policy: str, schedule: str = "periodic", do_sample: bool = False) -> None:
    """Go on from random tokens."""
    prompt = torch.randint(3, 64, (4, 40), device=model.device)
    cache = kvenv.EvictingCache(model, agents.make(policy), budget=BUDGET, interval=INTERVAL, schedule=schedule)
    settings: dict[str, Any] = {"max_new_tokens": 40, "do_sample": do_sample, "pad_token_id": 0}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **settings)


def models(now: Round) -> int:
    """Make a model of every architecture, load others from directories that are new to the process, and drop all."""
    for architecture in ARCHITECTURES:
        model = _random_model(architecture).to(now.device)
        use_kvenv_attention(model)  # here, because the cache would tell of it, every time
        _generate(model, "snapkv")
        fingerprint(model)
        kvenv.restore(model)
    # The first round fills what a process keeps.
    for number in range(3 if now.number else KEPT + 1):
        directory = now.directory / f"model-{now.number}-{number}"
        shutil.copytree(TINY, directory)
        with no_progress_bar():
            env = gymnasium.make("KVEvict-v0", model=str(directory), **now.terms)
        env.reset(seed=number)
        env.close()
        shutil.rmtree(directory)
    return 0


def _random_model(architecture: str) -> Any:
    """Return a small model of random weights."""
    settings: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    if architecture == "phi3":
        settings["original_max_position_embeddings"] = 512
    if architecture == "mistral":
        settings["sliding_window"] = None
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings)).eval()


class Breaking(Policy):
    """Breaks off in the middle of a forward call."""

    name = "breaking"

    def __call__(self, state: kvenv.LayerState) -> torch.Tensor:
        """Raise."""
        raise FloatingPointError(f"no priorities for {tuple(state.keys.shape)}")


def mistakes(now: Round) -> int:
    """Do what is refused, or breaks; it must leave nothing behind."""
    env = kvenv.KVEvictVectorEnv(ROWS, **now.terms)
    actions = env.action_space.sample()
    loaded = kvenv.load_model("tiny", device=now.device)
    trace = kvenv.load_traces("recall", tokenizer=loaded.tokenizer, trace_length=LENGTH)[now.number]
    terms: Any = {"model": loaded.model, "budget": BUDGET, "interval": INTERVAL}
    for _ in range(8):
        _refused(lambda: env.step(actions), ResetNeeded)
        _refused(lambda: kvenv.KVEvictEnv(model="nobody"), ValueError)
        _refused(lambda: kvenv.KVEvictEnv(**now.terms | {"budget": 3}), ValueError)
        _refused(lambda: kvenv.rollout(Breaking(), [trace], **terms), FloatingPointError)
    env.reset(seed=now.number)
    for _ in range(8):
        _refused(lambda: env.step(actions * np.nan), ValueError)
        _refused(lambda: env.reset(options={"budget": BUDGET + 1}), ValueError)
        _refused(lambda: env.reset(options={"colour": 1}), ValueError)
    env.close()
    return 0


def _refused(call: Callable[[], object], error: type[Exception]) -> None:
    """Call what must fail.

    Raises
    ------
    RuntimeError
        If it doesn't.
    """
    try:
        call()
    except error:
        return
    raise RuntimeError(f"no {error.__name__} where one was due")
