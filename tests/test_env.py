"""KVEvict-v0 for one trace: what libraries ask of it, and that stepping is the layer-by-layer rollout."""

from __future__ import annotations

import json
import math
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

import kvenv
from kvenv.decode import full_cache_losses
from kvenv.env import KVEvictEnv
from kvenv.expert import GoldenExpert, policy_action
from kvenv.features import MEMORY_TABLE_MODELS, memory_table
from kvenv.golden import future_attention
from kvenv.layerwise import rollout
from kvenv.models import TINY, load_model
from kvenv.ranking import order_from_action
from tests.environments import ARGUMENTS, BUDGET, INTERVAL, LENGTH, PROTECTION, RECENT, SINKS, single, trace
from tests.policies import Mixed, Random, kvenv_model

# Stable-Baselines3 takes a Box of three dimensions for an image. (L, H, C) keeps the form that the action addresses;
# HeadView has flat rows, and SB3's policies flatten what isn't uint8 anyway.
SB3_WARNINGS = [
    r"observation positions is an image but its `dtype` is \(int64\)",
    r"observation space positions is an image but the upper and lower bounds are not in \[0, 255\]",
    r"minimal resolution for an image is 36x36",
    r"observation features has an unconventional shape",
]


@pytest.mark.parametrize("features", ["kv", "foresight", "stats"])
@pytest.mark.parametrize("schedule", ["periodic", "prefill"])
def test_gymnasium_finds_nothing_to_complain_about(features: str, schedule: str) -> None:
    env = gym.make("KVEvict-v0", **ARGUMENTS, features=features, schedule=schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    env.close()


def test_stable_baselines3_finds_only_what_is_listed() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env_for_sb3(single(features="stats"))
    unexpected = [str(w.message) for w in caught if not any(re.search(x, str(w.message)) for x in SB3_WARNINGS)]
    assert unexpected == []


@pytest.mark.parametrize("name", ["KVEvict-v0", "kvenv:KVEvict-v0"])
def test_specs_survive_json(name: str) -> None:
    env = gym.make(name, **ARGUMENTS, features="stats", render_mode="ansi")
    spec = EnvSpec.from_json(env.spec.to_json())
    assert json.loads(env.spec.to_json())["kwargs"]["traces"] == ARGUMENTS["traces"]
    twin = gym.make(spec)
    first, _ = env.reset(seed=3)
    second, _ = twin.reset(seed=3)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def play(env: KVEvictEnv, policy, **reset) -> tuple[list[float], list[dict], list[dict]]:
    """Return rewards, observations and infos of an episode."""
    observation, _ = env.reset(**reset)
    observations, rewards, infos = [observation], [], []
    terminated = False
    while not terminated:
        observation, reward, terminated, truncated, info = env.step(policy_action(env, policy))
        assert truncated is False
        assert env.observation_space.contains(observation)
        observations.append(observation)
        rewards.append(reward)
        infos.append(info)
    return rewards, observations, infos


POLICIES = [Random(), Mixed("stats"), Mixed("last_attention", "queries", "query_moments")]


@pytest.mark.parametrize("schedule", ["periodic", "prefill"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: "+".join(sorted(policy.needs)))
def test_stepping_is_the_layer_by_layer_rollout(policy, schedule: str) -> None:
    env = single(schedule=schedule)
    for trace_id in range(3):
        rewards, _, infos = play(env, policy, seed=7, options={"trace": trace_id, "rollout": 5})
        own = trace(trace_id)
        lost: dict[tuple[int, int], list[np.ndarray]] = {}

        def remember(state, order, count, lost=lost):
            at = (state.layer, int(state.next_position[0]))
            lost[at] = [
                state.positions[0, head].gather(0, order[0, head, : count[0, head]]).numpy()
                for head in range(order.shape[1])
            ]

        result = rollout(
            policy,
            [own],
            model=kvenv_model(),
            budget=BUDGET,
            interval=INTERVAL,
            schedule=schedule,
            protection=PROTECTION,
            seed=7,
            rollouts=[5],
            on_eviction=remember,
        )
        first = BUDGET + INTERVAL if schedule == "periodic" else own.prompt_length
        scored = result.losses.nll[0, first : len(own.tokens) - 1]
        assert math.isclose(sum(rewards), -float(scored.sum()) / INTERVAL, abs_tol=1e-9)
        counts = [info["scored_tokens"] for info in infos]
        steps = math.ceil((len(own.tokens) - 1 - first) / INTERVAL) if schedule == "periodic" else 1
        assert len(rewards) == steps
        assert sum(counts) == len(scored)
        for info, losses in zip(infos, scored.split(counts), strict=True):
            assert math.isclose(info["lm_loss"], float(losses.mean()), abs_tol=1e-9)
        starts = [first, *(info["position"] for info in infos[:-1])]
        for start, info in zip(starts, infos, strict=True):
            for layer, heads in enumerate(info["evicted"]):
                for head, evicted in enumerate(heads):
                    np.testing.assert_array_equal(evicted[evicted >= 0], lost[layer, start][head])


def test_exactly_the_top_ranked_and_the_protected_are_kept() -> None:
    env = single()
    rng = np.random.default_rng(0)
    observation, info = env.reset(seed=1, options={"trace": 0})
    terminated = False
    while not terminated:
        # Few values, so that ties are many.
        action = rng.integers(-2, 3, env.action_space.shape).astype(np.float32) / 2
        before, start = observation, info["position"]
        observation, _, terminated, _, info = env.step(action)
        for head in np.ndindex(action.shape[:2]):
            positions, mask = before["positions"][head], before["mask"][head]
            held = set(positions[positions >= 0])
            protected = {p for p in held if p < SINKS or p >= start - RECENT}
            assert held - protected == set(positions[mask == 1])
            ranked = sorted(held - protected, key=lambda p: (action[head][positions == p][0], p))
            kept = protected | set(ranked[len(held) - BUDGET :])
            now = observation["positions"][head]
            assert set(now[now >= 0]) == kept | set(range(start, info["position"]))
            assert list(info["evicted"][head][: len(held) - BUDGET]) == ranked[: len(held) - BUDGET]


def test_slots_mean_nothing() -> None:
    env, twin = single(features="foresight"), single(features="foresight")
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=0, options={"trace": 2})
    twin.reset(seed=0, options={"trace": 2})
    terminated = False
    while not terminated:
        shuffle(twin, rng)
        other = twin.vector.dynamics.cache.positions.transpose(0, 1)[0].numpy()
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        order, other_order = observation["positions"].argsort(-1), other.argsort(-1)
        moved = np.empty_like(action)
        np.put_along_axis(moved, other_order, np.take_along_axis(action, order, -1), -1)
        observation, reward, terminated, _, info = env.step(action)
        twin_observation, twin_reward, _, _, twin_info = twin.step(moved)
        assert math.isclose(reward, twin_reward, abs_tol=1e-9)
        np.testing.assert_array_equal(info["evicted"], twin_info["evicted"])
        order, other_order = (x["positions"].argsort(-1)[..., None] for x in (observation, twin_observation))
        np.testing.assert_allclose(
            np.take_along_axis(observation["features"], order, -2),
            np.take_along_axis(twin_observation["features"], other_order, -2),
            atol=1e-5,
        )


def shuffle(env: KVEvictEnv, rng: np.random.Generator) -> None:
    """Permute the slots of every (layer, head)."""
    tensors = env.vector.dynamics.cache.row_tensors()
    slots = env.vector.dynamics.capacity
    for layer, head in np.ndindex(tensors["positions"][0].shape[0], tensors["positions"][0].shape[2]):
        order = torch.as_tensor(rng.permutation(slots))
        for name in ("keys", "values"):
            own = tensors[f"{name}.{layer}"][0][0, head]
            own.copy_(own.index_select(0, order))
        for name, axis in (("positions", 0), ("stats", 2), ("last_attention", 1)):
            if name in tensors:
                own = tensors[name][0][layer, 0, head]
                own.copy_(own.index_select(axis, order))


def test_the_golden_expert_evicts_what_has_the_least_future() -> None:
    own, model = trace(0), kvenv_model()
    for reduce in ("max", "sum"):
        for schedule in ("periodic", "prefill"):
            first = BUDGET + INTERVAL if schedule == "periodic" else own.prompt_length
            future = future_attention(model, [own.tokens], interval=INTERVAL, anchors=first, reduce=reduce)[0]
            env = single(schedule=schedule)
            observation, info = env.reset(seed=0, options={"trace": 0})
            terminated = False
            while not terminated:
                action = GoldenExpert(env, reduce).action()
                assert env.action_space.contains(action)
                positions, mask = torch.as_tensor(observation["positions"]), torch.as_tensor(observation["mask"])
                order = order_from_action(torch.as_tensor(action), positions, mask)
                for layer in range(len(positions)):
                    utility = future.at(layer, positions[layer][None], torch.tensor([info["position"]]))[0]
                    ordered = utility.gather(-1, order[layer])
                    for head in range(len(ordered)):
                        candidates = ordered[head, : int(mask[layer, head].sum())]
                        assert (candidates.diff() >= 0).all()
                observation, _, terminated, _, info = env.step(action)


def test_golden_expected_acts_on_the_families() -> None:
    env = KVEvictEnv(trace_length=100, budget=40, interval=32)
    env.reset(seed=0)
    action = GoldenExpert(env, expected=True).action()
    assert env.action_space.contains(action)
    other = single()
    other.reset(seed=0)
    with pytest.raises(ValueError, match="cannot be continued"):
        GoldenExpert(other, expected=True).action()


@pytest.mark.parametrize("features", ["kv", "foresight"])
def test_a_fork_replays_identically(features: str) -> None:
    env = single(features=features)
    env.reset(seed=4)
    env.step(policy_action(env, Random()))
    env.track(())
    fork = env.snapshot()

    def go_on(env: KVEvictEnv) -> tuple[list, dict, int]:
        rewards, terminated = [], False
        while not terminated:
            observation, reward, terminated, _, info = env.step(policy_action(env, Random()))
            rewards.append((reward, info["evicted"].tolist()))
        return rewards, observation, env.reset()[1]["trace"]

    there, observation, next_trace = go_on(env)
    back = env.restore(fork)
    again, observation_again, next_trace_again = go_on(env)
    other = single(features=features)
    other.reset(seed=99)
    restored = other.restore(fork)
    elsewhere, observation_elsewhere, next_trace_elsewhere = go_on(other)
    assert there == again == elsewhere
    assert next_trace == next_trace_again == next_trace_elsewhere
    for key in observation:
        np.testing.assert_array_equal(back[key], restored[key])
        np.testing.assert_array_equal(observation[key], observation_again[key])
        np.testing.assert_array_equal(observation[key], observation_elsewhere[key])


def test_a_fork_carries_what_it_followed() -> None:
    env, other = single(), single()
    env.reset(seed=4)
    policy = Mixed("stats", "query_moments")
    env.step(policy_action(env, policy))
    other.reset(seed=5)
    other.restore(env.snapshot())
    np.testing.assert_array_equal(policy_action(env, policy), policy_action(other, policy))


def test_a_smaller_budget_leaves_slots_empty() -> None:
    rewards, observations, infos = play(single(), Random(), seed=2, options={"trace": 1, "budget": 14})
    twin_rewards, twin_observations, _ = play(single(budget=14), Random(), seed=2, options={"trace": 1})
    np.testing.assert_allclose(rewards, twin_rewards, atol=1e-9)
    assert infos[0]["budget"] == 14
    for one, other in zip(observations, twin_observations, strict=True):
        np.testing.assert_array_equal((one["positions"] >= 0).sum(-1), (other["positions"] >= 0).sum(-1))
        assert not one["features"][one["positions"] < 0].any()


def test_the_terminal_observation_of_prefill_shows_the_prompt_only() -> None:
    _, observations, infos = play(single(schedule="prefill"), Random(), seed=0, options={"trace": 1})
    prompt = trace(1).prompt_length
    held = observations[-1]["positions"]
    assert held.max() < prompt
    assert ((held >= 0).sum(-1) == BUDGET).all()
    assert infos[-1]["position"] == len(trace(1).tokens) - 1


def test_info_has_every_term() -> None:
    env = single(full_metrics=True)
    own = trace(0)
    full = full_cache_losses(kvenv_model(), [own.tokens])
    _, _, infos = play(env, Random(), seed=0, options={"trace": 0})
    start = BUDGET + INTERVAL
    for info in infos:
        window = slice(start, info["position"])
        expected = full.nll[0, window].mean()
        assert math.isclose(info["full_lm_loss"], float(expected), abs_tol=1e-9)
        assert math.isclose(info["full_entropy"], float(full.entropy[0, window].mean()), abs_tol=1e-9)
        assert math.isclose(info["lm_loss_increase"], info["lm_loss"] - info["full_lm_loss"], abs_tol=1e-9)
        targets = range(start + 1, info["position"] + 1)
        answers = [t for t in targets if any(a <= t < b for a, b in own.answers)]
        assert info["answer_tokens"] == len(answers)
        assert ("answer_loss" in info) == bool(answers)
        if answers:
            loss = full.nll[0, torch.tensor(answers) - 1].mean()
            assert math.isclose(info["full_answer_loss"], float(loss), abs_tol=1e-9)
            assert 0 <= info["answer_accuracy"] <= 1
        start = info["position"]
    assert "full_lm_loss" not in play(single(), Random(), seed=0)[2][0]


def test_rendering() -> None:
    text, picture = single(render_mode="ansi"), single(render_mode="rgb_array")
    for env in (text, picture):
        env.reset(seed=0, options={"trace": 0})
        env.step(policy_action(env, Random()))
    lines = text.render().splitlines()
    assert lines[0] == f"{BUDGET + 2 * INTERVAL} of {LENGTH} tokens decoded"
    assert len(lines) == 5
    held = text.vector.dynamics.cache.positions[1, 0, 1]
    bars = lines[4].split("|")[1]
    assert [place for place, bar in enumerate(bars) if bar == "█"] == sorted(held[held >= 0].tolist())
    assert bars.endswith("·" * (LENGTH - BUDGET - 2 * INTERVAL))
    frame = picture.render()
    assert frame.dtype == np.uint8
    assert frame.shape == (2 * (2 * 8 + 2), 768 // LENGTH * LENGTH, 3)


def test_the_docstring_is_the_documentation_page() -> None:
    page = KVEvictEnv.__doc__
    for heading in ("Description", "Action Space", "Observation Space", "Rewards", "Starting State", "Episode End"):
        assert f"## {heading}\n" in page
    for line in memory_table().splitlines():
        assert line in page
    for argument in set(KVEvictEnv.__init__.__kwdefaults__):
        assert f"| ``{argument}`` |" in page
    for argument, default in KVEvictEnv.__init__.__kwdefaults__.items():
        shown = json.dumps(default) if isinstance(default, str) else str(default)
        assert re.search(rf"\| ``{argument}`` \| \w+ \| ``{re.escape(shown)}`` \|", page), argument


def test_the_memory_table_is_of_the_bundled_llm_and_true() -> None:
    config = json.loads((TINY / "config.json").read_text())
    heads = config["num_key_value_heads"]
    shape = (config["num_hidden_layers"], heads, config["num_attention_heads"] // heads, config["head_dim"], 80)
    assert MEMORY_TABLE_MODELS[0] == ("tiny", *shape)
    env = KVEvictEnv(features="foresight")
    observation, _ = env.reset(seed=0)
    assert env.observation_nbytes == sum(x.nbytes for x in observation.values())


def test_models_are_loaded_once_per_process() -> None:
    one, two = KVEvictEnv(), KVEvictEnv(features="stats")
    assert one.vector.dynamics.model is two.vector.dynamics.model is load_model("tiny").model


def test_seeds_choose_traces() -> None:
    env = single()
    first = [env.reset(seed=0)[1]["trace"], env.reset()[1]["trace"]]
    again = [env.reset(seed=0)[1]["trace"], env.reset()[1]["trace"]]
    assert first == again
    assert first[0] != first[1]
    assert env.reset(seed=1)[1]["trace"] != first[0]
    assert kvenv.KVEvictEnv is KVEvictEnv
