"""HeadView: the same environment, one row per (trace, layer, KV head)."""

from __future__ import annotations

import gc

import gymnasium as gym
import numpy as np
import pytest
import torch

import kvenv
from kvenv.expert import policy_action
from tests.environments import ARGUMENTS, vector
from tests.policies import Random


@pytest.mark.parametrize("output", ["numpy", "torch"])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_rows_are_the_traces_heads(mode: str, output: str) -> None:
    env, twin = (vector(3, autoreset_mode=mode, output=output, features="stats") for _ in range(2))
    heads = kvenv.HeadView(env)
    layers, kv_heads, slots, _ = env.feature_shape
    assert heads.num_envs == 3 * layers * kv_heads == 12
    assert heads.metadata["autoreset_mode"] is env.metadata["autoreset_mode"]
    pairs = [(heads.reset(seed=0), twin.reset(seed=0))]
    for _ in range(7):
        action = policy_action(twin, Random())
        pairs.append((heads.step(action.reshape(12, slots)), twin.step(action)))
    for split, whole in pairs:
        observation, trace_observation = split[0], whole[0]
        assert heads.observation_space.contains({name: np.asarray(x) for name, x in observation.items()})
        for row in range(12):
            trace, layer, head = np.unravel_index(row, (3, layers, kv_heads))
            assert (observation["layer"][row], observation["head"][row]) == (layer, head)
            for name, value in trace_observation.items():
                np.testing.assert_array_equal(observation[name][row], value[trace, layer, head])
            for mine, theirs in zip(split[1:4], whole[1:4], strict=False):
                if not isinstance(mine, dict):
                    assert mine[row] == theirs[trace]
            info, trace_info = split[-1], whole[-1]
            assert info.keys() == trace_info.keys()
            assert info["trace"][row] == trace_info["trace"][trace]
            if "evicted" in info:
                np.testing.assert_array_equal(info["evicted"][row], trace_info["evicted"][trace, layer, head])
            if "final_obs" in info and info["_final_obs"][row]:
                final = trace_info["final_obs"][trace]
                np.testing.assert_array_equal(info["final_obs"][row]["features"], final["features"][layer, head])
                assert info["final_obs"][row]["layer"] == layer
                assert info["final_info"]["lm_loss"][row] == trace_info["final_info"]["lm_loss"][trace]
    assert any("final_obs" in split[-1] for split, _ in pairs) == (mode == "SameStep")


def test_a_reset_mask_may_be_per_row_or_per_trace() -> None:
    heads = kvenv.HeadView(vector(2, autoreset_mode="Disabled"))
    heads.reset(seed=0)
    per_row = np.repeat([False, True], 4)
    for mask in (per_row, np.array([False, True])):
        _, info = heads.reset(options={"reset_mask": mask})
    np.testing.assert_array_equal(info["rollout"], np.repeat([0, 2], 4))
    with pytest.raises(ValueError, match="splits the rows of a trace"):
        heads.reset(options={"reset_mask": np.arange(8) == 3})


def test_it_takes_what_make_vec_makes_and_nothing_else() -> None:
    heads = kvenv.HeadView(gym.make_vec("KVEvict-v0", num_envs=2, **ARGUMENTS, render_mode="ansi"))
    heads.reset(seed=0)
    assert heads.step(heads.action_space.sample())[1].shape == (8,)
    assert len(heads.render()) == 2
    heads.close()
    with pytest.raises(ValueError, match="must be a KVEvictVectorEnv"):
        kvenv.HeadView(gym.make_vec("CartPole-v1", num_envs=2))


def test_a_view_that_goes_leaves_its_environment_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before gymnasium 1.3 a vector environment closes itself when it is collected."""
    closed: list[object] = []
    env = vector(2)
    monkeypatch.setattr(env, "close_extras", lambda **_: closed.append(env))
    monkeypatch.setattr("sys.unraisablehook", closed.append)
    kvenv.HeadView(env)
    with pytest.raises(ValueError, match="must be a KVEvictVectorEnv"):
        kvenv.HeadView(gym.make_vec("CartPole-v1", num_envs=2))
    gc.collect()
    assert not closed


def test_wrong_actions() -> None:
    heads = kvenv.HeadView(vector(2, output="torch"))
    heads.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(8, 3\)"):
        heads.step(torch.zeros(8, 3))
    with pytest.raises(ValueError, match="NaN"):
        heads.step(torch.full(heads.action_space.shape, torch.nan))
