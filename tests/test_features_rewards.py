"""Feature sets and rewards, against plain numpy and the user's own functions."""

from __future__ import annotations

import cmath
import math
from typing import Any

import numpy as np
import pytest
import torch

import kvenv
from kvenv.decode import full_cache_losses
from kvenv.expert import policy_action
from kvenv.features import STATS_FEATURES, feature_set
from kvenv.registry import FEATURES, REWARDS
from kvenv.rewards import WindowLosses, low_entropy
from kvenv.state import STATS, LayerState
from tests.environments import BUDGET, INTERVAL, single, trace, vector
from tests.policies import Random, kvenv_model


@pytest.mark.parametrize("features", ["kv", "foresight", "pre-rope", "stats"])
def test_features_say_what_the_state_says(features: str) -> None:
    env = single(features=features)
    observation, _ = env.reset(seed=0, options={"trace": 1, "budget": 15})
    for _ in range(2):
        observation, *_ = env.step(policy_action(env, Random()))
    for state in env.layer_states(feature_set(features).needs):
        seen = observation["features"][state.layer]
        assert np.isfinite(seen).all()
        held = observation["positions"][state.layer]
        np.testing.assert_array_equal(held, state.positions[0])
        assert not seen[held < 0].any()
        for head, slot in zip(*np.nonzero(held >= 0), strict=True):
            expected = plain(features, state, head, slot)
            np.testing.assert_allclose(seen[head, slot], expected, rtol=1e-5, atol=1e-6)


def plain(features: str, state: LayerState, head: int, slot: int) -> list[float]:
    """Return the features of one slot, computed one number at a time."""
    key, value = (x[0, head, slot].tolist() for x in (state.keys, state.values))
    position = int(state.positions[0, head, slot])
    if features == "kv":
        return [*key, *value, position]
    per_query_head = state.stats[0, head, :, slot].tolist()
    if features == "foresight":
        return [*key, *value, *(x for numbers in per_query_head for x in numbers)]
    age = int(state.next_position[0]) - position
    if features == "pre-rope":
        norms = [math.log(math.hypot(*x)) for x in (key, value)]
        logs = [math.log2(1 + x) / 8 for x in (position, age)]
        angles = [x * math.pi * 2**octave for octave in range(3) for x in logs]
        where = [*(x - 0.75 for x in logs), *map(math.sin, angles), *map(math.cos, angles)]
        return [
            *turned_back(key, position),
            *value,
            *(x for numbers in per_query_head for x in numbers),
            *norms,
            *where,
        ]
    cached = int((state.positions[0, head] >= 0).sum())
    mean = {name: sum(numbers[i] for numbers in per_query_head) / 2 for i, name in enumerate(STATS)}
    window = state.interval
    spans = {"sum": window, "sum8": min(8, window), "sum16": min(16, window), "sum32": min(32, window)}
    spans |= {"max": 1, "min": 1, "cumulative": age, "decayed": 10 * window}
    return [
        math.log1p(math.hypot(*key)),
        math.log1p(math.hypot(*value)),
        math.log2(1 + position) / 16,
        math.log2(1 + age) / 16,
        *(math.log1p(cached * mean[name] / spans[name]) for name in STATS),
    ]


def turned_back(key: list[float], position: int) -> list[float]:
    """Return a key at position 0: dimensions i and i + D/2 are a complex number that turned by position * theta_i."""
    half = len(key) // 2
    theta = kvenv_model().config.rope_parameters["rope_theta"]
    turned = [complex(key[i], key[i + half]) * cmath.exp(-1j * position * theta ** (-i / half)) for i in range(half)]
    return [x.real for x in turned] + [x.imag for x in turned]


def test_stats_are_few_and_of_order_one() -> None:
    assert len(STATS_FEATURES) <= 16
    env = kvenv.KVEvictEnv(features="stats")
    observation, _ = env.reset(seed=0)
    for _ in range(3):
        observation, *_ = env.step(env.action_space.sample())
    filled = observation["features"][observation["positions"] >= 0]
    assert filled.shape[-1] == len(STATS_FEATURES)
    assert 0 <= filled.min() <= filled.max() < 6


@pytest.fixture
def registered() -> Any:
    """Registered features and rewards, gone after the test."""
    yield
    for registry in (FEATURES, REWARDS):
        for name in [name for name in registry.names() if name.startswith("mine")]:
            del registry._values[name]


def episode(env: Any) -> tuple[list[float], list[dict[str, Any]]]:
    """Return rewards and infos of an episode on trace 0."""
    env.reset(seed=3, options={"trace": 0})
    rewards, infos, terminated = [], [], False
    while not terminated:
        _, reward, terminated, _, info = env.step(policy_action(env, Random()))
        rewards.append(reward)
        infos.append(info)
    return rewards, infos


def test_the_three_rewards(registered: None) -> None:
    own = trace(0)
    full = full_cache_losses(kvenv_model(), [own.tokens])
    first = BUDGET + INTERVAL
    full_nll, entropy = full.nll[0, first:].numpy(), full.entropy[0, first:].numpy()
    total = sum(info["lm_loss"] * info["scored_tokens"] for info in episode(single())[1])
    assert math.isclose(sum(episode(single())[0]), -total / INTERVAL, abs_tol=1e-9)
    increase = (-total + full_nll.sum()) / INTERVAL
    assert math.isclose(sum(episode(single(reward="lm_loss_increase"))[0]), increase, abs_tol=1e-9)

    tokens: list[np.ndarray] = []
    kvenv.register_reward("mine", lambda losses: tokens.append(losses.nll[0].numpy()) or -losses.nll.sum(1))
    episode(single(reward="mine"))
    delta = np.concatenate(tokens)[: len(full_nll)] - full_nll
    low = np.argsort(entropy, kind="stable")[: int(0.8 * len(entropy))]
    spikes = sum(delta[t] ** 2 for t in low if delta[t] > 1.5)
    assert spikes > 0, "no spike, nothing tested"
    rewards, infos = episode(single(reward="foresight"))
    assert math.isclose(sum(rewards), -spikes / len(low), abs_tol=1e-9)
    assert math.isclose(sum(info["foresight"] * info["scored_tokens"] for info in infos), spikes, abs_tol=1e-9)


def test_the_short_window_is_divided_by_w_too() -> None:
    rewards, infos = episode(single())
    assert infos[-1]["scored_tokens"] < INTERVAL
    assert math.isclose(rewards[-1], -infos[-1]["lm_loss"] * infos[-1]["scored_tokens"] / INTERVAL, abs_tol=1e-9)


def test_low_entropy_is_the_lower_four_fifths() -> None:
    assert low_entropy(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])).tolist() == [False, True, True, True, True]
    assert low_entropy(torch.tensor([5.0])).tolist() == [True]
    assert low_entropy(torch.zeros(10)).sum() == 8


def test_the_full_cache_runs_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(model: Any, traces: list[np.ndarray]) -> Any:
        calls.append(len(traces))
        return full_cache_losses(model, traces)

    monkeypatch.setattr("kvenv.lookahead.full_cache_losses", counted)
    episode(single())
    assert calls == []
    env = vector(3, reward="foresight", autoreset_mode="SameStep")
    env.reset(seed=0, options={"trace": [0, 1, 1]})
    for _ in range(4):
        env.step(policy_action(env, Random()))
    assert calls == [2], "one pass for two different traces, none for every window"
    env.reset(seed=0, options={"trace": [1, 0, 1]})
    env.step(policy_action(env, Random()))
    assert calls == [2], "traces are remembered"


def test_a_users_reward(registered: None) -> None:
    seen: list[WindowLosses] = []

    def worst(losses: WindowLosses) -> torch.Tensor:
        seen.append(losses)
        return -losses.nll.amax(dim=1)

    kvenv.register_reward("mine", worst)
    env = vector(2, reward="mine")
    env.reset(seed=0, options={"trace": [0, 2]})
    for _ in range(5):
        _, reward, *_ = env.step(policy_action(env, Random()))
    np.testing.assert_allclose(reward, -seen[-1].nll.amax(dim=1), atol=1e-9)
    assert reward[1] == 0, "row 1 is being reset and was paid"
    first = BUDGET + INTERVAL
    np.testing.assert_array_equal(seen[0].positions[0], np.arange(first + 1, first + INTERVAL + 1))
    kvenv.register_reward("mine-constant", lambda losses: torch.ones(2))
    constant = vector(2, reward="mine-constant")
    constant.reset(seed=0, options={"trace": [0, 2]})
    paid = [constant.step(policy_action(constant, Random()))[1].tolist() for _ in range(5)]
    assert paid == [[1, 1]] * 4 + [[1, 0]]
    kvenv.register_reward("mine-wrong", lambda losses: losses.nll)
    wrong = vector(2, reward="mine-wrong")
    wrong.reset(seed=0)
    with pytest.raises(ValueError, match=r"reward 'mine-wrong' returned torch.Size\(\[2, 6\]\)"):
        wrong.step(policy_action(wrong, Random()))


def test_a_users_features(registered: None) -> None:
    def norms(state: LayerState) -> torch.Tensor:
        return state.keys.norm(dim=-1, keepdim=True).expand(-1, -1, -1, 3)

    kvenv.register_features("mine", norms, size=lambda head_dim, groups: groups + 1)
    env = single(features="mine")
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert observation["features"].shape[-1] == 3
    kvenv.register_features("mine-wide", norms, size=2)
    with pytest.raises(ValueError, match="features 'mine-wide' returned 3 numbers per slot"):
        single(features="mine-wide").reset(seed=0)
    kvenv.register_features("mine-flat", lambda state: state.keys.sum(dim=-1), size=1)
    with pytest.raises(ValueError, match="features 'mine-flat' returned shape"):
        single(features="mine-flat").reset(seed=0)
    kvenv.register_features("mine-numpy", lambda state: state.keys.numpy(), size=8)
    with pytest.raises(ValueError, match="features 'mine-numpy' returned ndarray: a tensor of shape"):
        single(features="mine-numpy").reset(seed=0)
    kvenv.register_features("mine-golden", lambda state: state.future[..., None], size=1, needs=frozenset({"future"}))
    with pytest.raises(ValueError, match=r"features 'mine-golden' need \['future'\]: known are stats, .*noise"):
        single(features="mine-golden")
