"""KVEvict-v0 for N traces: autoreset, seeding, rows that don't disturb each other, numpy and torch."""

from __future__ import annotations

import json
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from hypothesis import given, settings
from hypothesis import strategies as st

from kvenv.expert import policy_action
from kvenv.vector_env import KVEvictVectorEnv
from tests.environments import ARGUMENTS, BUDGET, single, vector
from tests.policies import Mixed, Random

MODES = [mode.value for mode in AutoresetMode]


@pytest.mark.parametrize("mode", [*MODES, *AutoresetMode])
def test_make_vec_knows_all_modes(mode: str | AutoresetMode) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make_vec("KVEvict-v0", num_envs=3, **ARGUMENTS, autoreset_mode=mode)
    assert isinstance(env, KVEvictVectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode(mode)
    assert env.autoreset_mode == AutoresetMode(mode).value
    assert KVEvictVectorEnv.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert json.loads(env.spec.to_json())["kwargs"]["autoreset_mode"] == env.autoreset_mode
    observation, _ = env.reset(seed=0)
    for _ in range(8):
        assert env.observation_space.contains(observation)
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert reward.shape == terminated.shape == truncated.shape == (3,)
        assert reward.dtype == np.float64
        assert terminated.dtype == truncated.dtype == np.bool_
    env.close()


def test_gymnasiums_statistics_work_on_top() -> None:
    env = RecordEpisodeStatistics(vector(3, autoreset_mode="SameStep"))
    env.reset(seed=0)
    returns = np.zeros(3)
    for _ in range(4):
        _, reward, terminated, _, info = env.step(env.action_space.sample())
        returns += reward
        for row in np.flatnonzero(terminated):
            assert np.isclose(info["episode"]["r"][row], returns[row])
        returns[terminated] = 0


def transcript(env: KVEvictVectorEnv, policy: Any, steps: int, **reset: Any) -> list[list[dict[str, Any]]]:
    """Return what every row of an environment without autoreset saw, up to its end: [row][step]."""
    rows: list[list[dict[str, Any]]] = [[] for _ in range(env.num_envs)]
    _, info = env.reset(**reset)
    for _ in range(steps):
        observation, reward, terminated, _, info = env.step(policy_action(env, policy))
        for row in np.flatnonzero(info["active"]):
            held = observation["positions"][row].argsort(-1)
            rows[row].append(
                {
                    "trace": info["trace"][row],
                    "evicted": info["evicted"][row],
                    "positions": np.take_along_axis(observation["positions"][row], held, -1),
                    "features": np.take_along_axis(observation["features"][row], held[..., None], -2),
                    "reward": reward[row],
                    "terminated": terminated[row],
                }
            )
    return rows


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """Two rows saw the same: kept sets exactly, numbers closely."""
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        for key in ("trace", "evicted", "positions", "terminated"):
            np.testing.assert_array_equal(left[key], right[key])
        np.testing.assert_allclose(left["reward"], right["reward"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(left["features"], right["features"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["periodic", "prefill"])
def test_a_row_is_the_single_environment_with_its_seed(schedule: str) -> None:
    policy, traces = Mixed("stats"), [0, 4, 2, 1]
    rows = transcript(
        vector(4, features="foresight", schedule=schedule, autoreset_mode="Disabled"),
        policy,
        7,
        seed=10,
        options={"trace": traces},
    )
    assert len({len(row) for row in rows}) > 1 or schedule == "prefill"
    for row, trace in enumerate(traces):
        env = single(features="foresight", schedule=schedule)
        alone = transcript(env.vector, policy, 7, seed=10 + row, options={"trace": trace})[0]
        assert_same(rows[row], alone)


def test_drawn_traces_are_those_of_the_single_environment() -> None:
    env = vector(3, autoreset_mode="SameStep")
    _, info = env.reset(seed=5)
    expected = []
    for row in range(3):
        alone = single()
        expected.append([alone.reset(seed=5 + row)[1]["trace"], alone.reset()[1]["trace"]])
    np.testing.assert_array_equal(info["trace"], [first for first, _ in expected])
    again = np.zeros(3, np.int64)
    for _ in range(7):
        _, _, terminated, _, info = env.step(env.action_space.sample())
        again = np.where(terminated & (again == 0), info["trace"], again)
    np.testing.assert_array_equal(again, [second for _, second in expected])


@settings(max_examples=10)
@given(
    traces=st.lists(st.integers(0, 30), min_size=2, max_size=4),
    resets=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(14, 20)), max_size=3),
)
def test_resets_beside_a_row_leave_it_alone(traces: list[int], resets: list[tuple[int, int, int]]) -> None:
    """Row 0 runs its trace while the others are reset whenever, with whatever budget."""
    rows = len(traces)
    policy = Random()
    alone = transcript(vector(1, autoreset_mode="Disabled"), policy, 6, seed=0, options={"trace": traces[0]})[0]
    env = vector(rows, autoreset_mode="Disabled")
    env.reset(seed=0, options={"trace": traces})
    seen = []
    for step in range(6):
        for at, row, budget in resets:
            if at == step and 0 < row < rows:
                mask = np.arange(rows) == row
                env.reset(options={"reset_mask": mask, "budget": budget})
        observation, reward, terminated, _, info = env.step(policy_action(env, policy))
        if info["active"][0]:
            held = observation["positions"][0].argsort(-1)
            seen.append(
                {
                    "trace": info["trace"][0],
                    "evicted": info["evicted"][0],
                    "positions": np.take_along_axis(observation["positions"][0], held, -1),
                    "features": np.take_along_axis(observation["features"][0], held[..., None], -2),
                    "reward": reward[0],
                    "terminated": terminated[0],
                }
            )
    assert_same(seen, alone)


def test_a_seed_of_numpy_is_an_int() -> None:
    traces = [vector(3).reset(seed=seed)[1]["trace"].tolist() for seed in (5, np.int64(5))]
    assert traces[0] == traces[1]
    assert len(set(traces[0])) == 3


def test_rows_of_a_group_share_a_trace_and_not_their_noise() -> None:
    env = vector(3)
    _, info = env.reset(seed=[8, 8, 8], options={"trace": 1, "rollout": [0, 1, 0]})
    np.testing.assert_array_equal(info["trace"], [1, 1, 1])
    np.testing.assert_array_equal(info["rollout"], [0, 1, 0])
    _, reward, *_, info = env.step(policy_action(env, Random()))
    np.testing.assert_array_equal(info["evicted"][0], info["evicted"][2])
    assert (info["evicted"][0] != info["evicted"][1]).any()
    assert np.isclose(reward[0], reward[2], atol=1e-9)


# Traces 0, 1, 2 have 60, 55, 50 tokens: with C = 26 and W = 6 that is 6, 5, 4 steps.
STEPS = np.array([6, 5, 4])
OPTIONS = {"trace": [0, 1, 2]}


def test_next_step() -> None:
    env = vector(3)
    env.reset(seed=0, options=OPTIONS)
    for step in range(1, 6):
        action = policy_action(env, Random())
        observation, reward, terminated, truncated, info = env.step(action)
        np.testing.assert_array_equal(terminated, step == STEPS)
        assert not truncated.any()
        resetting = step == STEPS + 1
        np.testing.assert_array_equal(info["active"], ~resetting)
        np.testing.assert_array_equal(info["_lm_loss"], ~resetting)
        np.testing.assert_array_equal(reward == 0, resetting)
        np.testing.assert_array_equal(info["rollout"], resetting.astype(int))
        if resetting.any():
            row = int(np.flatnonzero(resetting)[0])
            assert set(observation["positions"][row].ravel()) == set(range(26))
            assert info["position"][row] == 26
            alone = single()
            alone.reset(seed=row, options={"trace": int(info["trace"][row])})
            first = alone.vector.dynamics.observe()["features"][0].numpy()
            np.testing.assert_allclose(observation["features"][row], first, atol=1e-5)


def test_same_step() -> None:
    env, twin = vector(3, autoreset_mode="SameStep"), vector(3, autoreset_mode="Disabled")
    env.reset(seed=0, options=OPTIONS)
    twin.reset(seed=0, options=OPTIONS)
    for step in range(1, 5):
        observation, reward, terminated, _, info = env.step(policy_action(env, Random()))
        last, same_reward, _, _, last_info = twin.step(policy_action(twin, Random()))
        np.testing.assert_array_equal(terminated, step == STEPS)
        np.testing.assert_allclose(reward, same_reward, atol=1e-9)
    assert list(info["_final_obs"]) == list(info["_final_info"]) == [False, False, True]
    assert info["final_obs"][0] is info["final_obs"][1] is None
    for name, value in info["final_obs"][2].items():
        np.testing.assert_allclose(value, last[name][2], atol=1e-5)
    final = info["final_info"]
    for name in ("lm_loss", "evicted", "trace", "position"):
        np.testing.assert_allclose(final[name][2], last_info[name][2], atol=1e-9)
        np.testing.assert_array_equal(final[f"_{name}"], [False, False, True])
    np.testing.assert_array_equal(info["_lm_loss"], [True, True, False])
    assert info["rollout"][2] == 1
    assert set(observation["positions"][2].ravel()) == set(range(26))


def test_disabled_rows_idle_until_their_reset() -> None:
    env = vector(3, autoreset_mode="Disabled")
    env.reset(seed=0, options=OPTIONS)
    shown: dict[int, np.ndarray] = {}
    for step in range(1, 9):
        observation, reward, terminated, _, info = env.step(policy_action(env, Random()))
        np.testing.assert_array_equal(terminated, step >= STEPS)
        np.testing.assert_array_equal(info["active"], step <= STEPS)
        np.testing.assert_array_equal(reward == 0, step > STEPS)
        np.testing.assert_array_equal(info["_evicted"], step <= STEPS)
        assert (info["evicted"][~info["active"]] == -1).all()
        assert np.isfinite(observation["features"]).all()
        # What an idle row shows stays as its first idle step left it.
        for row in np.flatnonzero(step > STEPS):
            held = observation["positions"][row]
            assert ((held >= 0).sum(-1) == BUDGET).all()
            np.testing.assert_array_equal(held, shown.setdefault(row, held))
    observation, info = env.reset(options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(info["active"], [False, True, False])
    np.testing.assert_array_equal(info["rollout"], [0, 1, 0])
    *_, terminated, _, info = env.step(policy_action(env, Random()))
    np.testing.assert_array_equal(info["active"], [False, True, False])
    np.testing.assert_array_equal(terminated, [True, False, True])


@pytest.mark.parametrize("mode", MODES)
def test_max_episode_steps_truncates(mode: str) -> None:
    env = gym.make_vec("KVEvict-v0", num_envs=3, **ARGUMENTS, autoreset_mode=mode, max_episode_steps=4)
    env.reset(seed=0, options=OPTIONS)
    for step in range(1, 5):
        _, _, terminated, truncated, info = env.step(policy_action(env, Random()))
        np.testing.assert_array_equal(terminated, (step == 4) & (STEPS == 4))
        np.testing.assert_array_equal(truncated, (step == 4) & (STEPS > 4))
    _, reward, terminated, truncated, info = env.step(policy_action(env, Random()))
    ended = mode == "Disabled"
    np.testing.assert_array_equal(terminated, ended & (STEPS == 4))
    np.testing.assert_array_equal(truncated, ended & (STEPS > 4))
    assert (reward == 0).all() == (mode != "SameStep")
    np.testing.assert_array_equal(info["active"], [mode == "SameStep"] * 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", ["periodic", "prefill"])
def test_torch_output_is_numpy_output(mode: str, schedule: str) -> None:
    arguments = {"autoreset_mode": mode, "schedule": schedule, "max_episode_steps": 5, "reward": "foresight"}
    arrays, tensors = vector(3, **arguments), vector(3, output="torch", **arguments)
    pairs = [(arrays.reset(seed=0), tensors.reset(seed=0))]
    for _ in range(7):
        action = policy_action(arrays, Random())
        same = policy_action(tensors, Random())
        assert isinstance(same, torch.Tensor)
        np.testing.assert_array_equal(action, same)
        pairs.append((arrays.step(action), tensors.step(same)))
    for array, tensor in pairs:
        compare(array, tensor)
    outcome = pairs[-1][1]
    assert all(isinstance(x, torch.Tensor) for x in (*outcome[0].values(), *outcome[1:4]))
    assert isinstance(outcome[4]["lm_loss"], torch.Tensor)


def compare(array: Any, tensor: Any) -> None:
    """Same structure, same numbers."""
    if isinstance(array, dict):
        assert array.keys() == tensor.keys()
        for key in array:
            compare(array[key], tensor[key])
    elif isinstance(array, tuple) or (isinstance(array, np.ndarray) and array.dtype == object):
        assert len(array) == len(tensor)
        for one, other in zip(array, tensor, strict=True):
            compare(one, other)
    elif array is None:
        assert tensor is None
    else:
        np.testing.assert_allclose(np.asarray(tensor, dtype=array.dtype), array, rtol=0, atol=1e-9)


@pytest.mark.parametrize("output", ["numpy", "torch"])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_what_was_returned_stays_as_it_is(output: str, num_envs: int) -> None:
    env = vector(num_envs, output=output, features="stats", autoreset_mode="SameStep")
    returned = [env.reset(seed=0)]
    for _ in range(7):
        returned.append(env.step(policy_action(env, Random())))
        if len(returned) == 2:
            copies = [{key: np.asarray(value).copy() for key, value in outcome[0].items()} for outcome in returned]
    for outcome, copied in zip(returned, copies, strict=False):
        for key, value in copied.items():
            np.testing.assert_array_equal(np.asarray(outcome[0][key]), value)
    pointers = [np.asarray(x).__array_interface__["data"][0] for outcome in returned for x in outcome[0].values()]
    assert len(set(pointers)) == len(pointers)


def test_a_vector_snapshot_forks_all_rows() -> None:
    env = vector(3, autoreset_mode="SameStep", output="torch", reward="foresight")
    env.reset(seed=0, options=OPTIONS)
    for _ in range(3):
        env.step(policy_action(env, Random()))
    fork = env.snapshot()

    def go_on(env: KVEvictVectorEnv) -> list[Any]:
        return [env.step(policy_action(env, Random())) for _ in range(5)]

    there = go_on(env)
    other = vector(3, autoreset_mode="SameStep", output="torch", reward="foresight")
    for forked in (env, other):
        forked.restore(fork)
        for one, again in zip(there, go_on(forked), strict=True):
            torch.testing.assert_close(one[1], again[1], rtol=0, atol=0)
            assert torch.equal(one[4]["evicted"], again[4]["evicted"])
            np.testing.assert_array_equal(one[4]["trace"], again[4]["trace"])
            for key in one[0]:
                assert torch.equal(one[0][key], again[0][key])


def test_environments_and_generate_interleave_on_one_model() -> None:
    policy = Mixed("stats")
    expected = [transcript(vector(2, autoreset_mode="Disabled"), policy, 5, seed=seed) for seed in (0, 7)]
    envs = [vector(2, autoreset_mode="Disabled") for _ in range(2)]
    for env, seed in zip(envs, (0, 7), strict=True):
        env.reset(seed=seed)
    model = envs[0].dynamics.model
    prompt = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(0))
    plain = model.generate(prompt, max_new_tokens=4, do_sample=False)
    for step in range(5):
        for env, rows in zip(envs, expected, strict=True):
            _, reward, _, _, info = env.step(policy_action(env, policy))
            for row in np.flatnonzero(info["active"]):
                assert np.isclose(reward[row], rows[row][step]["reward"], atol=1e-9)
            list(env.layer_states({"future"}))
            assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), plain)
