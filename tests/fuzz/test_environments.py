"""Any sequence of calls of an environment works or is refused as documented, and nothing depends on what was refused.

Whatever works is done by a twin, too, which never sees what was refused: both must always say the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from kvenv.env import KVEvictEnv
from kvenv.rank_env import KVRankEnv
from kvenv.registry import FEATURES, REWARDS
from kvenv.snapshot import Counters, Snapshot
from kvenv.state import NEEDS
from tests.environments import single, vector
from tests.fuzz.counted import Sequences, fuzz, run_sequences
from tests.fuzz.values import JUNK

REFUSALS = (ValueError, ResetNeeded)
"""What the docstrings say."""


def same(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Return whether two results of environments are equal, NaN being NaN, floats within a tolerance."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name], tolerance) for name in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(same(x, y, tolerance) for x, y in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and same(one.cpu().numpy(), other.cpu().numpy(), tolerance)
    if isinstance(one, np.ndarray) and one.dtype == object:
        return same(one.tolist(), other.tolist(), tolerance)
    if isinstance(one, np.ndarray):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        if one.dtype.kind != "f":
            return np.array_equal(one, other)
        return np.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True)
    if type(one) is float is type(other):
        return one == other or one != one or abs(one - other) <= tolerance
    return type(one) is type(other) and (one == other or one != one)


def by_row(value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return one value, or one or two of them for several rows."""
    return value | st.lists(value, min_size=1, max_size=3)


INTEGERS = st.integers(-1, 25)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "trace": by_row(INTEGERS) | JUNK,
        "budget": by_row(INTEGERS) | JUNK,
        "rollout": by_row(INTEGERS) | JUNK,
        "cut": INTEGERS | JUNK,
        "reset_mask": st.lists(st.booleans(), max_size=3).map(np.array) | JUNK,
        "unknown": JUNK,
    },
)
RESETS = st.fixed_dictionaries(
    {}, optional={"seed": by_row(INTEGERS) | st.none() | JUNK, "options": st.none() | OPTIONS | OPTIONS | JUNK}
)

REFUSED_LATE = [{"budget": 10**6}, {"trace": -1}, {"cut": 10**6}, {"trace": 10**6, "cut": 10**6}]
"""Options that no environment takes; those that it knows are held against what was drawn."""

SPOILERS: dict[str, Callable[[np.ndarray], Any]] = {
    "nothing": lambda x: x,
    "a tensor": torch.from_numpy,
    "a gradient": lambda x: torch.from_numpy(x).requires_grad_(),
    "a list": lambda x: x.tolist(),
    "one NaN": lambda x: np.where(np.arange(x.size).reshape(x.shape) == x.size - 1, np.nan, x),
    "a NaN in a tensor": lambda x: torch.full(x.shape, torch.nan),
    "infinite": lambda x: np.where(x > 0, np.inf, -np.inf),
    "float64": lambda x: x.astype(np.float64) * 1e300,
    "float16": lambda x: x.astype(np.float16),
    "longdouble": lambda x: x.astype(np.longdouble),
    "whole": lambda x: (x * 10).astype(np.int64),
    "uint64": lambda x: (abs(x) * 1e19).astype(np.uint64),
    "yes or no": lambda x: x > 0,
    "bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
    "complex": lambda x: x.astype(np.complex64),
    "a complex tensor": lambda x: torch.from_numpy(x.astype(np.complex64)),
    "strings": lambda x: x.astype(str),
    "objects": lambda x: x.astype(object),
    "backwards": lambda x: x[..., ::-1],
    "too short": lambda x: x[..., 1:],
    "flat": lambda x: x.reshape(-1),
    "sparse": lambda x: torch.from_numpy(x).to_sparse(),
    "on no device": lambda x: torch.from_numpy(x).to("meta"),
}
"""What can be wrong with an action, and what only looks so."""


def settings_of(env: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return arguments with which an environment can be made."""
    if env == "rank":
        return st.fixed_dictionaries({"heads": st.sampled_from([None, [[0, 1]], [[1, 0], [0, 1]]])})
    own = {
        "schedule": st.sampled_from(["periodic", "prefill"]),
        "features": st.sampled_from(["stats", "kv"]),
        "reward": st.sampled_from(["lm_loss", "answer_loss", "foresight"]),
        "full_metrics": st.booleans(),
        "render_mode": st.sampled_from(["ansi", "rgb_array"]),
    }
    if env == "vector":
        own |= {
            "num_envs": st.integers(1, 3),
            "output": st.sampled_from(["numpy", "torch"]),
            "autoreset_mode": st.sampled_from(list(AutoresetMode)),
            "max_episode_steps": st.none() | st.integers(1, 3),
        }
    return st.fixed_dictionaries(own)


def damaged(snapshot: Snapshot, field: str, value: Any, name: str) -> Snapshot:
    """Return a snapshot of which one field is something else, or one of what it holds."""
    if field == "tensors":
        return replace(snapshot, tensors={**snapshot.tensors, name: value})
    if field == "counters":
        now = snapshot.counters.copy()
        return replace(snapshot, counters=replace(now, **{name: value}))
    return replace(snapshot, **{field: value})


class Calls(Sequences):
    """Calls of an environment; ``make`` and ``arguments`` say of which."""

    make: Callable[..., Any]
    arguments: st.SearchStrategy[dict[str, Any]]

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """Make an environment and its twin."""
        self.settings = data.draw(self.arguments)
        self.env, self.twin = (type(self).make(**self.settings) for _ in range(2))
        self.seeded, self.snapshots = False, list[Snapshot]()

    def both(self, call: Callable[[Any], Any], must: bool = False) -> None:
        """Call the environment; if it doesn't refuse (which it may not if it ``must`` work), its twin."""
        try:
            told = call(self.env)
        except REFUSALS:
            if must:
                raise
            return
        assert same(told, call(self.twin)), "what was refused before has left a trace"

    @rule(seed=st.integers(0, 5))
    def reset(self, seed: int) -> None:
        """Reset as usual."""
        self.both(lambda env: env.reset(seed=seed), must=True)
        self.seeded = True

    @precondition(lambda self: self.seeded)  # without any seed twins differ
    @rule()
    def reset_on(self) -> None:
        """Reset without a seed."""
        self.both(lambda env: env.reset(), must=True)

    @precondition(lambda self: self.seeded)
    @rule(arguments=RESETS)
    def reset_somehow(self, arguments: dict[str, Any]) -> None:
        """Reset with anything."""
        self.both(lambda env: env.reset(**arguments))

    @rule(seed=st.none() | st.integers(0, 1), options=st.sampled_from(REFUSED_LATE))
    def reset_refused_late(self, seed: int | None, options: dict[str, int]) -> None:
        """Reset with what is refused only when seeds were taken and numbers drawn."""
        with pytest.raises(ValueError, match=r"option|trace|cut"):
            self.env.reset(seed=seed, options=options)

    @precondition(lambda self: not self.seeded)
    @rule(arguments=RESETS.filter(lambda arguments: arguments.get("seed") is not None))
    def reset_first(self, arguments: dict[str, Any]) -> None:
        """Reset for the first time with anything."""
        self.both(lambda env: env.reset(**arguments))

    @rule(seed=st.integers(0, 9), spoiler=st.sampled_from(["nothing", "nothing", *SPOILERS]))
    def step(self, seed: int, spoiler: str) -> None:
        """Step, with an action that may be anything."""
        action = np.random.default_rng(seed).uniform(-1, 1, self.env.action_space.shape).astype(np.float32)
        self.both(lambda env: env.step(SPOILERS[spoiler](action)))

    @rule(action=JUNK)
    def step_with_junk(self, action: Any) -> None:
        """Step with what is no action at all."""
        with pytest.raises(REFUSALS):
            self.env.step(action)

    @rule()
    def close(self) -> None:
        """Close, which nobody minds."""
        self.env.close()

    def teardown(self) -> None:
        """Compare with a fresh environment, which follows as much: that tells in which slots pairs lie."""
        if not hasattr(self, "env"):
            return
        fresh = type(self).make(**self.settings)
        self.follow_as_much(fresh)
        action = np.random.default_rng(0).uniform(-1, 1, fresh.action_space.shape).astype(np.float32)
        for call in (lambda env: env.reset(seed=3), lambda env: env.step(action), lambda env: env.reset()):
            # Losses of the full cache are those of before, rounded as they were beside other traces.
            assert same(call(self.env), call(fresh), tolerance=1e-9), "it isn't as good as new"

    def follow_as_much(self, fresh: Any) -> None:
        """Let an environment follow what this one does."""


class Evictions(Calls):
    """Calls of KVEvict-v0, which can be taken back, too."""

    def follow_as_much(self, fresh: Any) -> None:
        """Let an environment follow what this one does."""
        fresh.track(self.env.snapshot().needs)

    @rule()
    def render(self) -> None:
        """Draw."""
        self.both(lambda env: env.render())

    @precondition(lambda self: self.seeded)
    @rule()
    def snapshot(self) -> None:
        """Remember where it is."""
        self.snapshots = [*self.snapshots[-3:], self.env.snapshot()]

    @rule(which=st.integers(0, 3))
    def restore(self, which: int) -> None:
        """Go back."""
        if self.snapshots:
            snapshot = self.snapshots[which % len(self.snapshots)]
            self.both(lambda env: env.restore(snapshot), must=True)

    @rule(field=st.sampled_from([x.name for x in fields(Snapshot)]), data=st.data(), value=JUNK)
    def restore_damaged(self, field: str, data: st.DataObject, value: Any) -> None:
        """Go back to what isn't whole."""
        if not self.snapshots:
            return
        snapshot, name = self.snapshots[-1], ""
        if field in ("tensors", "counters"):
            names = list(snapshot.tensors) if field == "tensors" else [x.name for x in fields(Counters)]
            name = data.draw(st.sampled_from(names))
            value = data.draw(st.just(value) | st.sampled_from([torch.zeros(1), np.zeros(1, np.int64), np.array([99])]))
        self.both(lambda env: env.restore(damaged(snapshot, field, value, name)))

    @rule(value=JUNK)
    def restore_junk(self, value: Any) -> None:
        """Go back to what is no snapshot."""
        with pytest.raises(ValueError, match="snapshot"):
            self.env.restore(value)

    @rule(changes=settings_of("vector"))
    def restore_foreign(self, changes: dict[str, Any]) -> None:
        """Go back to where another environment was."""
        other = vector(**changes)
        other.reset(seed=1)
        snapshot = other.snapshot()
        self.both(lambda env: env.restore(snapshot))

    @rule(needs=st.lists(st.sampled_from(NEEDS), max_size=3) | JUNK, reduce=st.sampled_from(["max", "sum"]) | JUNK)
    def look(self, needs: Any, reduce: Any) -> None:
        """Look at what a policy sees."""
        self.both(lambda env: [vars(state) for state in env.layer_states(needs, reduce)])

    @rule(needs=st.lists(st.sampled_from(NEEDS), max_size=3) | JUNK)
    def track(self, needs: Any) -> None:
        """Follow more."""
        self.both(lambda env: env.track(needs))


@pytest.mark.parametrize("kind", ["single", "vector"])
def test_calls_of_kvevict(kind: str) -> None:
    class OfThis(Evictions):
        make = staticmethod(single if kind == "single" else vector)
        arguments = settings_of(kind)

    run_sequences(OfThis, 12)


def test_calls_of_kvrank(rank_store: str) -> None:
    class OfThis(Calls):
        make = staticmethod(lambda **arguments: KVRankEnv(store=rank_store, **arguments))
        arguments = settings_of("rank")

    run_sequences(OfThis, 12)


KNOWN = {
    "model": ["tiny", "nobody/nothing", "\0", "x" * 5000],
    "traces": ["recall", "recall+tracking", "a.txt", "x" * 5000 + ".txt", "\0.jsonl", "hf:x"],
    "split": ["train", "test"],
    "schedule": ["periodic", "prefill"],
    "features": FEATURES.names(),
    "reward": REWARDS.names(),
    "dtype": ["float32", "bfloat16"],
    "device": ["cuda", "meta", "mps", "cpu:9", "xpu:0"],
    "autoreset_mode": [*AutoresetMode],
    "output": ["numpy", "torch"],
    "render_mode": ["ansi", "human"],
}
"""What arguments can be, beside junk."""
OF_ROWS = ("num_envs", "autoreset_mode", "output", "max_episode_steps", "cuda_graph")
ARGUMENTS = st.dictionaries(
    st.sampled_from([*KVEvictEnv.__init__.__kwdefaults__, *OF_ROWS]), st.none(), min_size=1, max_size=3
).flatmap(
    lambda names: st.fixed_dictionaries({name: JUNK | st.sampled_from(KNOWN.get(name, [1, 30])) for name in names})
)


@fuzz(60, arguments=ARGUMENTS)
def test_arguments_make_an_environment_or_are_refused(arguments: dict[str, Any]) -> None:
    try:
        env = vector(**{"num_envs": 2, **arguments})
        env.reset(seed=0)
    except (*REFUSALS, FileNotFoundError):
        return
    env.step(env.action_space.sample())


@fuzz(30, arguments=st.fixed_dictionaries({}, optional={"heads": st.lists(st.lists(JUNK)) | JUNK, "features": JUNK}))
def test_arguments_make_a_ranking_environment_or_are_refused(rank_store: str, arguments: dict[str, Any]) -> None:
    try:
        env = KVRankEnv(store=rank_store, **arguments)
    except REFUSALS:
        return
    env.reset(seed=0)
    env.step(env.action_space.sample())
