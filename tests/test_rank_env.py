"""KVRank-v0: the reward against the formula, what libraries ask of it, what it refuses."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

import kvenv
from kvenv.models import LoadedModel
from kvenv.rank_env import KVRankEnv
from kvenv.ranking import action_from_order, eviction_order
from kvenv.recording import Recording, record
from kvenv.registry import FEATURES
from kvenv.store import StoreWriter, TraceStore
from tests.policies import kvenv_model, random_traces
from tests.test_env import SB3_WARNINGS

LENGTHS, INTERVAL = (30, 40, 23), 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the directory of a small store."""
    directory, model = tmp_path_factory.mktemp("store"), kvenv_model()
    made = Recording.of(
        LoadedModel("random", model, None), traces="random", split="train", trace_length=40, interval=INTERVAL
    )
    StoreWriter(directory, made).add(record(model, random_traces(list(LENGTHS)), INTERVAL))
    return str(directory)


def test_gymnasium_finds_nothing_to_complain_about(store: str) -> None:
    for options in ({}, {"heads": [[1, 0]]}):
        env = gym.make("KVRank-v0", store=store, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(env.unwrapped)
        env.close()


def test_stable_baselines3_finds_only_what_is_listed(store: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env_for_sb3(KVRankEnv(store=store))
    unexpected = [str(w.message) for w in caught if not any(re.search(x, str(w.message)) for x in SB3_WARNINGS)]
    assert unexpected == []


@pytest.mark.parametrize("name", ["KVRank-v0", "kvenv:KVRank-v0"])
def test_specs_survive_json(name: str, store: str) -> None:
    env = gym.make(name, store=store, heads=[[0, 1], [1, 1]])
    spec = EnvSpec.from_json(env.spec.to_json())
    assert json.loads(env.spec.to_json())["kwargs"]["heads"] == [[0, 1], [1, 1]]
    first, second = (e.reset(seed=3)[0] for e in (env, gym.make(spec)))
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def test_the_reward_is_the_formula_head_by_head(store: str) -> None:
    env, rng = KVRankEnv(store=store), np.random.default_rng(0)
    for number, trace in enumerate(TraceStore(store)):
        for cut in trace.cuts:
            observation, _ = env.reset(seed=0, options={"trace": number, "cut": cut})
            # Few values, so that ties are many.
            action = (rng.integers(-2, 3, env.action_space.shape) / 2).astype(np.float32)
            _, reward, terminated, truncated, info = env.step(action)
            assert terminated is True
            assert truncated is False
            utility = trace.utility_at(cut).double().numpy()
            for head in np.ndindex(utility.shape[:2]):
                held = [slot for slot, position in enumerate(observation["positions"][head]) if position >= 0]
                assert len(held) == cut
                ranked = sorted(held, key=lambda s, h=head: (-action[h][s], -observation["positions"][h][s]))
                paid = [utility[head][observation["positions"][head][slot]] for slot in ranked]
                cost = sum(rank * x for rank, x in enumerate(paid, start=1))
                best = sum(rank * x for rank, x in enumerate(sorted(paid, reverse=True), start=1))
                assert info["head_reward"][head] == pytest.approx(-cost / max(best, 1e-8), rel=1e-9)
            assert reward == pytest.approx(info["head_reward"].mean())


def test_the_oracle_gets_minus_one_and_its_reverse_the_least(store: str) -> None:
    env = KVRankEnv(store=store)
    rng = np.random.default_rng(1)
    for seed in range(4):
        rewards = []
        for sign in (1.0, -1.0, None):
            observation, info = env.reset(seed=seed)
            positions, mask = (torch.from_numpy(observation[name]) for name in ("positions", "mask"))
            utility = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed))
            if sign is not None:
                known = TraceStore(store)[info["trace"]].utility_at(info["cut"])
                utility[..., : info["cut"]] = sign * known
            action = action_from_order(eviction_order(utility, positions, mask.bool()), mask.bool()).numpy()
            rewards.append(env.step(action)[1])
        assert rewards[0] == pytest.approx(-1.0, abs=1e-9)
        assert rewards[1] < rewards[2] < rewards[0]
    observation, _ = env.reset(seed=0)
    assert (env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))[4]["head_reward"] <= -1).all()


def test_the_observation_is_the_trace_up_to_the_cut(store: str) -> None:
    env, trace = KVRankEnv(store=store), TraceStore(store)[1]
    observation, info = env.reset(seed=0, options={"trace": 1, "cut": 12})
    assert info == {"trace": 1, "cut": 12, "name": trace.name}
    assert env.observation_space.contains(observation)
    assert env.feature_shape[2] == 36
    pairs = torch.cat([trace.keys[:, :, :12], trace.values[:, :, :12]], dim=-1).float().numpy()
    np.testing.assert_array_equal(observation["features"][:, :, :12, :-1], pairs)
    np.testing.assert_array_equal(observation["features"][0, 0, :12, -1], np.arange(12))
    assert not observation["features"][:, :, 12:].any()
    np.testing.assert_array_equal(observation["positions"][1, 1], [*range(12), *[-1] * 24])
    np.testing.assert_array_equal(observation["mask"], observation["positions"] >= 0)
    assert sum(x.nbytes for x in observation.values()) == env.observation_nbytes


def test_heads_restrict_what_is_seen_and_paid(store: str) -> None:
    whole, some = KVRankEnv(store=store), KVRankEnv(store=store, heads=[[1, 0], [0, 1]])
    seen, _ = whole.reset(seed=5)
    part, _ = some.reset(seed=5)
    rows, columns = [1, 0], [0, 1]
    for name in seen:
        np.testing.assert_array_equal(part[name][:, 0], seen[name][rows, columns])
    action = whole.action_space.sample()
    _, _, _, _, info = whole.step(action)
    _, reward, _, _, own = some.step(action[rows, columns][:, None])
    np.testing.assert_array_equal(own["head_reward"][:, 0], info["head_reward"][rows, columns])
    assert reward == pytest.approx(own["head_reward"].mean())


def test_seeds_choose_traces_and_cuts(store: str) -> None:
    env = KVRankEnv(store=store)
    seen = [tuple(env.reset(seed=seed)[1].values()) for seed in range(40)]
    assert seen == [tuple(env.reset(seed=seed)[1].values()) for seed in range(40)]
    assert {trace for trace, _, _ in seen} == {0, 1, 2}
    assert len({(trace, cut) for trace, cut, _ in seen}) > 8
    env.reset(seed=1)
    follow = env.reset()[1]
    env.reset(seed=1)
    assert env.reset()[1] == follow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace": 3}, "trace 3 isn't in the store: it has 3"),
        ({"trace": 0, "cut": 7}, "multiple of 6 from 6 to 24"),
        ({"budget": 7}, "unknown option 'budget': known are trace, cut"),
        ({"trace": 1.7}, "option trace must be an integer, not 1.7"),
        ({"cut": "6"}, "option cut must be an integer, not '6'"),
        (7, "options must be a dict of trace, cut, not 7"),
    ],
)
def test_impossible_options_are_refused(store: str, options: dict[str, int], message: str) -> None:
    env, twin = KVRankEnv(store=store), KVRankEnv(store=store)
    for each in (env, twin):
        each.reset(seed=0)
    for seed in (None, 5):
        with pytest.raises(ValueError, match=message):
            env.reset(seed=seed, options=options)
    with pytest.raises(ValueError, match="seed must be an integer of at least 0"):
        env.reset(seed=-1)
    assert [env.reset()[1] for _ in range(5)] == [twin.reset()[1] for _ in range(5)], "what was refused left a trace"


@pytest.mark.parametrize(
    "heads", [[], [[0, 2]], [[2, 0]], [[0, 0], [0, 0]], [1], [[0]], 1, [[True, False]], [[0.0, 1.0]], [[[0], 1]]]
)
def test_impossible_heads_are_refused(store: str, heads: list) -> None:
    with pytest.raises(ValueError, match="layers 0 to 1 and KV heads 0 to 1"):
        KVRankEnv(store=store, heads=heads)


def test_misuse_is_refused(store: str, tmp_path: Path) -> None:
    env = KVRankEnv(store=store)
    with pytest.raises(ResetNeeded):
        env.step(env.action_space.sample())
    env.reset(seed=0)
    with pytest.raises(ValueError, match="was expected"):
        env.step(env.action_space.sample()[0])
    with pytest.raises(ValueError, match="NaN"):
        env.step(np.full(env.action_space.shape, np.nan, np.float32))
    env.step(env.action_space.sample())
    with pytest.raises(ResetNeeded):
        env.step(env.action_space.sample())
    with pytest.raises(FileNotFoundError, match=r"is no trace store.*kvenv record"):
        gym.make("KVRank-v0", store=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="store must be a directory, not 5"):
        KVRankEnv(store=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="features 'foresight' read stats"):
        KVRankEnv(store=store, features="foresight")


def test_registered_features_that_need_nothing_can_be_had(store: str) -> None:
    if "age-of-recorded" not in FEATURES:
        kvenv.register_features(
            "age-of-recorded", lambda s: (s.next_position[:, None, None] - s.positions)[..., None], 1
        )
    observation, info = KVRankEnv(store=store, features="age-of-recorded").reset(seed=0)
    cut = info["cut"]
    np.testing.assert_array_equal(observation["features"][0, 0, :cut, 0], np.arange(cut, 0, -1))


def test_without_a_store_the_bundled_llm_is_recorded() -> None:
    env = gym.make("KVRank-v0")
    observation, _ = env.reset(seed=0)
    assert observation["features"].shape == (5, 2, 240, 65)
    reward = env.step(env.action_space.sample())[1]
    assert reward < -1


def test_the_docstring_is_the_documentation_page() -> None:
    page = KVRankEnv.__doc__
    for heading in ("Description", "Action Space", "Observation Space", "Rewards", "Starting State", "Episode End"):
        assert f"## {heading}\n" in page
    for argument, default in KVRankEnv.__init__.__kwdefaults__.items():
        shown = json.dumps(default) if isinstance(default, str) else str(default)
        assert re.search(rf"\| ``{argument}`` \| \w+ \| ``{re.escape(shown)}`` \|", page), argument
    assert kvenv.KVRankEnv is KVRankEnv
