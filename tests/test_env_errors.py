"""Mistakes: each a clear error that names argument and value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded

import kvenv
from kvenv.limits import refuse_what_cannot_fit
from kvenv.registry import TRACES
from tests.environments import ARGUMENTS, LENGTH, ragged, single, vector

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "nowhere"}, r"unknown model 'nowhere': known are tiny, .*random-float64"),
    ({"traces": "nothing"}, r"unknown traces 'nothing': known are recall, .*ragged"),
    ({"model": torch.nn.Identity()}, r"model must be a name, not Identity: .*kvenv\.register_model"),
    ({"traces": ragged}, r"traces must be a name, not function: .*kvenv\.register_traces"),
    ({"split": "dev"}, r"split 'dev'.*train, validation, test"),
    ({"features": "foo"}, r"unknown features 'foo': known are kv, foresight, pre-rope, stats"),
    ({"reward": "foo"}, r"unknown reward 'foo': known are lm_loss, lm_loss_increase, foresight"),
    ({"schedule": "often"}, r"unknown schedule 'often': known are periodic, prefill"),
    ({"render_mode": "human"}, r"unknown render_mode 'human': known are None, ansi, rgb_array"),
    ({"dtype": "int4"}, r"dtype 'int4' is unknown"),
    ({"interval": 0}, r"interval must be an integer of at least 1, not 0"),
    ({"interval": 1.5}, r"interval must be an integer of at least 1, not 1.5"),
    ({"budget": 0}, r"budget must be an integer of at least 1, not 0"),
    ({"sinks": -1}, r"sinks must be an integer of at least 0, not -1"),
    ({"recent": -1}, r"recent must be an integer of at least 0, not -1"),
    ({"budget": 5}, r"budget 5 is less than the protected pairs, sinks 2 \+ recent 4"),
    ({"trace_length": 27}, r"trace_length 27 is too short: .*26 an episode needs at least 28"),
    ({"trace_length": 4096}, r"trace_length 4096 exceeds the 2048 positions of model 'random-float64'"),
    ({"model": []}, r"model must be a name, not list"),
    ({"model": "x" * 5000}, r"unknown model 'xxx"),
    ({"reward": []}, r"unknown reward \[\]: known are lm_loss"),
    ({"features": {}}, r"unknown features \{\}: known are kv"),
    ({"full_metrics": np.array([])}, r"full_metrics must be True or False, not array"),
    ({"protect_prompt": "no"}, r"protect_prompt must be True or False, not 'no'"),
    ({"schedule": []}, r"unknown schedule \[\]: known are periodic, prefill"),
    ({"split": np.array([1, 2])}, r"unknown split array\(\[1, 2\]\): known are train"),
    ({"model": "tiny", "dtype": []}, r"dtype \[\] is unknown"),
    ({"model": "tiny", "device": None}, r"device None is unknown"),
    ({"model": "tiny", "device": "meta"}, r"device 'meta' isn't available here"),
    ({"schedule": "prefill", "budget": 32}, r"budget 32 holds the longest prompt of 'ragged', 32 tokens"),
]


NAMES = [f"{number}-{'-'.join(changes)}" for number, (changes, _) in enumerate(WRONG)]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=NAMES)
def test_impossible_arguments(changes: dict[str, Any], message: str) -> None:
    for make in (single, vector):
        with pytest.raises(ValueError, match=message):
            make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"autoreset_mode": "Sometimes"},
            r"unknown autoreset_mode 'Sometimes': known are NextStep, SameStep, Disabled",
        ),
        ({"output": "jax"}, r"unknown output 'jax': known are numpy, torch"),
        ({"num_envs": 0}, r"num_envs must be an integer of at least 1, not 0"),
        ({"num_envs": 1.5}, r"num_envs must be an integer of at least 1, not 1.5"),
        ({"max_episode_steps": 0}, r"max_episode_steps must be an integer of at least 1, not 0"),
    ],
)
def test_impossible_arguments_of_the_vector_environment(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vector(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"foo": 1}, r"unknown option 'foo': known are trace, budget, rollout, reset_mask"),
        ({"budget": 21}, r"option budget 21 exceeds the environment's budget 20"),
        ({"budget": 5}, r"budget 5 is less than the 6 protected pairs of trace 'ragged/train/\d+'"),
        ({"trace": -1}, r"trace -1 of 'ragged' \(train\) does not exist"),
        ({"trace": "first"}, r"trace must be an integer or 3 of them, not 'first'"),
        ({"trace": [0, 1]}, r"trace must be an integer or 3 of them, not \[0, 1\]"),
        ({"trace": np.array(3)}, r"trace must be an integer or 3 of them, not array\(3\)"),
        ({"trace": 2**63}, r"trace 9223372036854775808 must be at least -9223372036854775808 and at most"),
        ({"rollout": [0, 1, 2**80]}, r"rollout 1208925819614629174706176 must be at least"),
        (5, r"options must be a dict of trace, budget, rollout, reset_mask, not 5"),
        ({"reset_mask": [True, True, True]}, r"reset_mask must be a numpy bool array of shape \(3,\)"),
        ({"reset_mask": np.zeros(3, np.bool_)}, r"reset_mask must be a numpy bool array of shape \(3,\) with a True"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    env = vector(3)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)


def test_a_first_reset_must_reset_all_rows() -> None:
    with pytest.raises(ValueError, match="never reset"):
        vector(2).reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ValueError, match="seed must be an integer or 2 of them"):
        vector(2).reset(seed=[1, 2, 3])


@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_wrong_actions(output: str) -> None:
    env = vector(2, output=output)
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape, np.float32)
    for wrong in (action[:1], action[..., :-1], action.reshape(2, -1), np.float32(0)):
        with pytest.raises(ValueError, match=r"actions have shape .*: \(2, 2, 2, 26\) \(N, L, H, C\) was expected"):
            env.step(torch.as_tensor(wrong) if output == "torch" else wrong)
    for wrong in (action.astype(str), action.astype(object), action.astype(np.complex64), [action, 1.0], None):
        with pytest.raises(ValueError, match=r"actions (must be an array of|have shape)"):
            env.step(wrong)
    for wrong in (torch.as_tensor(action, dtype=torch.complex64), torch.as_tensor(action).to_sparse()):
        with pytest.raises(ValueError, match="actions must be dense real numbers"):
            env.step(wrong)
    action[1, 0, 1, 0] = np.nan
    for given in (action, torch.as_tensor(action)):
        with pytest.raises(ValueError, match="actions contain NaN"):
            env.step(given)
    before = env.dynamics.counters.position.copy()
    assert (before == 26).all(), "a refused action took a step"


def test_wrong_actions_of_the_single_environment() -> None:
    env = single()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action has shape \(3,\): \(2, 2, 26\) \(L, H, C\) was expected"):
        env.step(np.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        env.step(np.full(env.action_space.shape, np.nan))


def test_stepping_what_is_over_or_has_not_begun() -> None:
    env = single()
    action = env.action_space.sample()
    with pytest.raises(ResetNeeded, match="call reset before step"):
        env.step(action)
    with pytest.raises(ResetNeeded, match="call reset before layer_states"):
        env.layer_states()
    env.reset(seed=0)
    terminated = False
    while not terminated:
        terminated = env.step(action)[2]
    with pytest.raises(ResetNeeded, match="the episode is over"):
        env.step(action)
    many = vector(2)
    with pytest.raises(ResetNeeded, match="call reset before step"):
        many.step(many.action_space.sample())


def traces_of(tokens: np.ndarray, prompt_length: int = 0) -> str:
    """Register a trace source that always gives these tokens."""
    name = f"fixed-{len(TRACES.names())}"
    kvenv.register_traces(name, lambda trace_id, **_: kvenv.Trace(tokens, prompt_length, (), "fixed"))
    return name


@pytest.mark.parametrize(
    ("length", "prompt", "changes", "message"),
    [
        (27, 0, {}, r"trace 'fixed' has 27 tokens: with budget 20 and interval 6 it needs at least 28"),
        (LENGTH + 1, 0, {}, rf"trace 'fixed' has {LENGTH + 1} tokens, more than trace_length {LENGTH}"),
        (
            40,
            18,
            {"protect_prompt": True},
            r"budget 20 is less than the 22 protected pairs of trace 'fixed'.*prompt 18",
        ),
        (40, 30, {"schedule": "prefill", "protect_prompt": True}, r"budget 20 is less than the 34 protected pairs"),
        (31, 30, {"schedule": "prefill"}, r"trace 'fixed' has 31 tokens: with a prompt of 30 it needs at least 32"),
    ],
)
def test_impossible_traces(length: int, prompt: int, changes: dict[str, Any], message: str) -> None:
    env = single(traces=traces_of(np.full(length, 5), prompt), **changes)
    with pytest.raises(ValueError, match=message):
        env.reset(seed=0)


def test_a_prompt_longer_than_the_longest_of_the_split() -> None:
    def growing(trace_id: int, **arguments: Any) -> kvenv.Trace:
        own = ragged(0, split="train", trace_length=LENGTH, tokenizer=None)
        return kvenv.Trace(own.tokens, 40 if trace_id > 31 else 30, (), f"growing/{trace_id}")

    if "growing" not in TRACES:
        kvenv.register_traces("growing", growing)
    env = single(traces="growing", schedule="prefill")
    env.reset(seed=0, options={"trace": 31})
    with pytest.raises(ValueError, match=r"trace 'growing/32' has a prompt of 40 tokens: .* the 30 slots"):
        env.reset(options={"trace": 32})


def test_tokens_that_the_model_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"token ids 3 to 64: model 'random-float64' knows 0 to 63"):
        single(traces=traces_of(np.arange(3, 65)), trace_length=62).reset(seed=0)


def test_needs_that_were_not_followed() -> None:
    env = single()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"needs names unknown \['foo'\]: known are stats"):
        env.layer_states({"foo"})
    env.step(env.action_space.sample())
    with pytest.raises(ValueError, match=r"needs \['queries'\] must be followed from the first token on"):
        env.layer_states({"queries", "noise", "future"})
    env.reset()
    env.track({"queries"})
    env.step(env.action_space.sample())
    assert next(iter(env.layer_states({"queries"}))).queries is not None


def test_foreign_snapshots() -> None:
    env = single()
    env.reset(seed=0)
    snapshot = env.snapshot()
    with pytest.raises(ValueError, match=r"taken with budget=20, this environment has 19"):
        single(budget=19).restore(snapshot)
    with pytest.raises(ValueError, match=r"taken with rows=1, this environment has 2"):
        vector(2).restore(snapshot)
    with pytest.raises(ValueError, match=r"taken with split='train', this environment has 'test'"):
        single(split="test").restore(snapshot)
    snapshot.tensors["keys.0"] = snapshot.tensors["keys.0"][..., :3]
    with pytest.raises(ValueError, match=r"the snapshot's keys\.0 has shape .*, this environment's"):
        env.restore(snapshot)


def test_what_is_refused_changes_nothing() -> None:
    env, twin = vector(2), vector(2)
    for each in (env, twin):
        each.reset(seed=0)
    for options in ({"budget": 21}, {"trace": [-1, 0]}, {"budget": 5}):
        with pytest.raises(ValueError, match=r"budget|trace"):
            env.reset(options=options)
        with pytest.raises(ValueError, match=r"budget|trace"):
            env.reset(seed=7, options=options)
    with pytest.raises(ValueError, match="seed -1 must be at least 0"):
        env.reset(seed=-1)
    (seen, info), (expected, told) = env.reset(), twin.reset()
    np.testing.assert_array_equal(seen["features"], expected["features"])
    np.testing.assert_array_equal(info["trace"], told["trace"])
    assert env.np_random_seed == twin.np_random_seed


def test_a_snapshot_that_is_refused_changes_nothing() -> None:
    env, other = single(), single(features="stats")
    other.reset(seed=1)
    env.reset(seed=0)
    foreign, own = other.snapshot(), env.snapshot()
    env.step(np.zeros(env.action_space.shape, np.float32))  # so that taking over any part of a snapshot is a change
    before = env.snapshot()
    wrong: list[tuple[Any, str]] = [
        (None, "a snapshot of snapshot"),
        # Its needs are others than this environment's, and fit: what doesn't is found before anything is replaced.
        (replace(foreign, tensors={**foreign.tensors, "keys.0": None}), "the snapshot's keys.0"),
        (replace(foreign, counters=replace(foreign.counters, trace=np.array([10**6]))), "are of no episode|snapshot's"),
        (
            replace(own, tensors={**own.tensors, "positions": own.tensors["positions"].int()}),
            "the snapshot's positions",
        ),
        (replace(own, counters=replace(own.counters, position=own.counters.last + 1)), "of row 0 are of no episode"),
        (replace(own, counters=replace(own.counters, truncated=np.array([99]))), "the snapshot's counters.truncated"),
        (replace(own, counters=None), "counters are of type NoneType"),
        (replace(own, needs=frozenset({"future"})), "the snapshot follows"),
        (replace(own, needs=3), "needs must be a list or set"),
        (replace(own, generators=()), "generators must be 1 states"),
        (replace(own, generators=({"state": 3},)), "no state of a generator"),
        (replace(own, seeds=(None,)), "seeds must be 1 integers"),
        (replace(own, begun=np.zeros(2, np.int64)), "the snapshot's begun"),
    ]
    for snapshot, message in wrong:
        with pytest.raises(ValueError, match=message):
            env.restore(snapshot)
    with pytest.raises(ValueError, match=r"the snapshot follows \[\]: \['stats'\] must be among them"):
        other.restore(own)
    after = env.snapshot()
    for name, value in vars(before.counters).items():
        np.testing.assert_array_equal(value, getattr(after.counters, name))
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())
    assert (before.generators, before.seeds, before.needs) == (after.generators, after.seeds, after.needs)


def test_rendering_what_has_not_begun() -> None:
    for mode in ("ansi", "rgb_array"):
        with pytest.raises(ResetNeeded, match="call reset before render"):
            single(render_mode=mode).render()


@pytest.mark.parametrize("needs", ["stats", b"", 3, None, torch.tensor(1), [[]]])
def test_needs_that_are_none(needs: Any) -> None:
    env = single()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"needs (must be a list or set of names|names unknown)"):
        env.track(needs)
    with pytest.raises(ValueError, match="unknown reduce 'mean': known are"):
        env.layer_states(reduce="mean")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "prompt", "answers", "message"),
    [
        (np.zeros(0, np.int64), 0, (), "must have an array of token ids"),
        (np.zeros((2, 3), np.int64), 0, (), "must have an array of token ids"),
        (np.zeros(5), 0, (), "must have an array of token ids"),
        ([1, 2, 3], 0, (), "must have an array of token ids"),
        (np.zeros(5, np.int64), 6, (), "has 5 tokens, but a prompt of 6"),
        (np.zeros(5, np.int64), 0, ((3, 6),), "has 5 tokens, but an answer from 3 to 6"),
    ],
)
def test_traces_that_are_none(tokens: Any, prompt: int, answers: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"trace 'mine' {message}"):
        kvenv.Trace(tokens, prompt, answers, "mine")


def test_observations_that_cannot_fit_are_refused() -> None:
    cpu = torch.device("cpu")
    refuse_what_cannot_fit(4, 10**6, "kv", cpu)
    with pytest.raises(
        ValueError, match=r"observations of features 'kv' take 425.0 MB a row, .*choose features='stats'"
    ):
        refuse_what_cannot_fit(10**6, 425 * 10**6, "kv", cpu)
    with pytest.raises(ValueError, match=r"observations of features 'kv' take .* for 1000000000 rows"):
        gym.make_vec("KVEvict-v0", num_envs=10**9, **ARGUMENTS)


def test_observations_that_cannot_fit_on_the_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        total_memory = 10**6

    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: Small)
    refuse_what_cannot_fit(2, 5 * 10**5, "kv", torch.device("cuda:0"))
    with pytest.raises(ValueError, match=r"and cuda:0 has 0\.0 GB"):
        refuse_what_cannot_fit(3, 5 * 10**5, "kv", torch.device("cuda:0"))


def test_rendering_without_a_mode_warns() -> None:
    env = single()
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="without a render_mode"):
        assert env.render() is None
