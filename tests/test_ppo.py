"""Stable-Baselines3's PPO must store the log-probability of what was evicted, learn, save, and resume bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

import agents
import kvenv
from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.learner import State
from agents.ppo import PPOConfig, PPOLearner
from agents.sb3_env import make_sb3_env
from agents.sb3_policy import EvictionDistribution, KVRankingPolicy
from kvenv.identity import ModelIdentity
from kvenv.layerwise import rollout
from tests.environments import ARGUMENTS, BUDGET, INTERVAL, PROTECTION, trace, vector
from tests.models import random_model

LAYERS_HEADS = 4
"""L * H of the random model."""


def small(num_envs: int = 2, **changes: Any) -> Any:
    """Return the small random environment for SB3."""
    return make_sb3_env(num_envs, **{**ARGUMENTS, **changes})


def ppo(env: VecEnv, policy: Any = KVRankingPolicy, **changes: Any) -> PPO:
    """Return a small PPO."""
    return PPO(policy, env, **{"n_steps": 8, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu", **changes})


def learner(**changes: Any) -> PPOLearner:
    """Return a small learner."""
    env = vector(2, features="stats", autoreset_mode="SameStep")
    return PPOLearner(env, PPOConfig(**{"minibatches": 2, "epochs": 2, "budgets": (16, BUDGET), **changes}))


class Recorder(BaseCallback):
    """Keeps what the environment said it evicted, and the buffer before SB3 reorders it."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.evicted.append(np.stack([info["evicted"] for info in self.locals["infos"]]))
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.locals["rollout_buffer"]
        self.observations = {name: x.copy() for name, x in buffer.observations.items()}
        self.actions, self.log_probs = buffer.actions.copy(), buffer.log_probs.copy()


def log_probability(scores: np.ndarray, picks: list[int], candidates: np.ndarray) -> float:
    """Return the log-probability of picks in order, each from a softmax of -scores over the candidates left."""
    left, total = candidates.copy(), 0.0
    for pick in picks:
        assert left[pick]
        total += -scores[pick] - np.log(np.exp(-scores[left]).sum())
        left[pick] = False
    return total


def test_the_executed_eviction_is_the_one_whose_log_probability_is_in_the_buffer() -> None:
    env, recorder = small(), Recorder()
    env.set_options([{"budget": budget} for budget in (16, BUDGET) for _ in range(LAYERS_HEADS)])
    model = ppo(env, learning_rate=0.0)
    with torch.no_grad():
        model.policy.scorer.last *= 300  # far from uniform, or a wrong order would do
    model.learn(model.n_steps * env.num_envs, callback=recorder)
    seen = recorder.observations
    assert set(seen["positions"].max(axis=-1)[0]) == {16 + INTERVAL - 1, BUDGET + INTERVAL - 1}
    with torch.no_grad():
        for step in range(model.n_steps):
            # The buffer of Stable-Baselines3 2.7.0 holds whole numbers as float32, too.
            at = (torch.as_tensor(seen["layer"][step, :, 0]).long(), torch.as_tensor(seen["head"][step, :, 0]).long())
            scores = model.policy.scorer(torch.as_tensor(seen["features"][step]), at).double().numpy()
            for row in range(env.num_envs):
                evicted = recorder.evicted[step][row]
                positions, mask = seen["positions"][step, row], seen["mask"][step, row].astype(bool)
                assert len(evicted) == seen["count"][step, row, 0] == INTERVAL
                picks = [int(np.flatnonzero(positions == position).item()) for position in evicted]
                expected = log_probability(scores[row], picks, mask)
                assert recorder.log_probs[step, row] == pytest.approx(expected, abs=1e-3)
                # The action itself says the same order: nothing was lost to clipping or float32.
                ranks = np.where(mask, recorder.actions[step, row], np.inf)
                assert positions[np.argsort(ranks, kind="stable")[:INTERVAL]].tolist() == evicted.tolist()


def test_only_the_prefix_has_a_probability() -> None:
    scores = torch.randn(1, 6)
    mask, positions = torch.tensor([[1, 1, 1, 1, 0, 0]]), torch.tensor([[0, 1, 2, 3, 4, -1]])
    distribution = EvictionDistribution(scores, positions, mask, torch.tensor([2]))
    action = distribution.sample()
    swapped = action.clone()
    last = action[0, :4].argsort()[2:]
    swapped[0, last] = action[0, last.flip(0)]
    torch.testing.assert_close(distribution.log_prob(action), distribution.log_prob(swapped))
    total = 0.0
    for first in range(4):
        for second in set(range(4)) - {first}:
            ranks = torch.ones(1, 6)
            ranks[0, first], ranks[0, second] = -1.0, -0.5
            total += float(distribution.log_prob(ranks).exp())
    assert total == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("policy", [KVRankingPolicy, "MultiInputPolicy"])
def test_a_saved_model_predicts_as_before_and_goes_on(policy: Any, tmp_path: Path) -> None:
    env = small()
    model = ppo(env, policy).learn(130)
    before = {name: x.clone() for name, x in model.policy.state_dict().items()}
    model.learn(64, reset_num_timesteps=False)
    assert any(not torch.equal(before[name], x) for name, x in model.policy.state_dict().items())
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=small(), device="cpu")
    observation = env.reset()
    action, _ = model.predict(observation, deterministic=True)
    np.testing.assert_array_equal(action, loaded.predict(observation, deterministic=True)[0])
    np.testing.assert_array_equal(action, model.predict(observation, deterministic=True)[0])
    one = {name: x[0] for name, x in observation.items()}
    np.testing.assert_allclose(model.predict(one, deterministic=True)[0], action[0], atol=1e-6)
    loaded.learn(64)


def test_training_twice_gives_the_same_weights() -> None:
    weights = [ppo(small()).learn(130).policy.state_dict() for _ in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_callbacks_evaluation_and_logger(tmp_path: Path) -> None:
    evaluation = small(split="validation")
    callbacks = [
        EvalCallback(evaluation, n_eval_episodes=8, eval_freq=8, log_path=str(tmp_path), verbose=0),
        CheckpointCallback(save_freq=8, save_path=str(tmp_path)),
    ]
    model = ppo(small()).learn(128, callback=callbacks)
    assert len(np.load(tmp_path / "evaluations.npz")["results"]) == 2
    assert len(list(tmp_path.glob("rl_model_*_steps.zip"))) == 2
    assert len(model.ep_info_buffer or ()) > 0
    evaluation.seed(0)
    returns, lengths = evaluate_policy(model, evaluation, n_eval_episodes=8, return_episode_rewards=True)
    assert len(set(np.round(returns, 4))) == 2, "rows of a trace have the trace's return"
    assert set(lengths) <= {4, 5, 6}


def test_rows_follow_their_traces() -> None:
    env, heads = small(), kvenv.HeadView(vector(2, features="stats", autoreset_mode="SameStep"))
    env.seed(3)
    mine, (theirs, _) = env.reset(), heads.reset(seed=3)
    for step in range(12):
        for name, value in theirs.items():
            np.testing.assert_array_equal(mine[name], value)
        np.testing.assert_array_equal(mine["count"], INTERVAL)
        action = np.random.default_rng(step).uniform(-1, 1, heads.action_space.shape).astype(np.float32)
        mine, reward, done, infos = env.step(action)
        theirs, expected, terminated, _, info = heads.step(action)
        np.testing.assert_allclose(reward, expected, rtol=1e-6)
        np.testing.assert_array_equal(done, terminated)
        for row in range(env.num_envs):
            ended = info["final_info"] if done[row] else info
            assert infos[row]["trace"] == ended["trace"][row]
            assert infos[row]["lm_loss"] == ended["lm_loss"][row]
            assert ("terminal_observation" in infos[row]) == ("episode" in infos[row]) == done[row]
            if done[row]:
                assert not infos[row]["TimeLimit.truncated"]
                assert env.observation_space.contains(infos[row]["terminal_observation"])
                assert env.unwrapped.reset_infos[row]["trace"] == info["trace"][row]
    env.seed(5)
    again = env.reset()
    env.seed(5)
    np.testing.assert_array_equal(env.reset()["features"], again["features"])


def test_truncated_episodes_are_marked() -> None:
    env = small(max_episode_steps=2)
    env.reset()
    for _ in range(2):
        _, _, done, infos = env.step(np.zeros((env.num_envs, BUDGET + INTERVAL)))
    assert done.all()
    assert all(info["TimeLimit.truncated"] for info in infos)
    assert ppo(env).learn(64).num_timesteps == 64


class Row(gym.Env[Any, np.ndarray]):
    """The first row of a VecEnv as an environment, for SB3's checker; the others act alike."""

    def __init__(self, env: VecEnv) -> None:
        self.env, self.observation_space, self.action_space = env, env.observation_space, env.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.env.seed(seed)
        return self._first(self.env.reset()), {}

    def step(self, action: np.ndarray) -> Any:
        observation, reward, done, infos = self.env.step(np.stack([action] * self.env.num_envs))
        return self._first(observation), float(reward[0]), bool(done[0]), False, infos[0]

    def _first(self, observation: Any) -> Any:
        return {name: x[0] for name, x in observation.items()}


def test_sb3s_checker_has_no_objection(recwarn: pytest.WarningsRecorder) -> None:
    check_env(Row(small(1)))
    (advice,) = [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]
    assert "features has an unconventional shape" in advice, "which MultiInputPolicy flattens and ours wants"


def test_attributes_and_methods_are_the_shared_environments() -> None:
    env = small(render_mode="rgb_array")
    assert not env.has_attr("marker")
    assert env.get_attr("features", indices=[0, 3]) == ["stats"] * 2
    env.set_attr("marker", 7)
    assert env.get_attr("marker") == [7] * 8
    with pytest.raises(ValueError, match="share one environment"):
        env.set_attr("marker", 8, indices=0)
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 8
    env.seed(0)
    env.reset()
    assert len({frame.shape for frame in env.env_method("render")[0]}) == 2, "traces of two lengths"
    assert env.env_method("snapshot", indices=1)[0].counters.steps.tolist() == [0, 0]
    assert env.render().ndim == 3
    env.set_options([{"budget": 16 + row % 2} for row in range(8)])
    with pytest.raises(ValueError, match="option 'budget' differs between the rows of a trace"):
        env.reset()
    env.close()


def test_other_observations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs the observations of agents\.make_sb3_env"):
        ppo(DummyVecEnv([lambda: gym.make("CartPole-v1")]), batch_size=8)
    with pytest.raises(ValueError, match="use_sde"):
        ppo(small(), use_sde=True)


class Bandit(VecEnv):
    """Evicting pairs whose first feature is positive costs 1 each, in one of two heads; in the other it pays."""

    ROWS, SLOTS, COUNT = 16, 8, 3

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.render_mode = None
        observation = spaces.Dict(
            {
                "features": spaces.Box(-9, 9, (self.SLOTS, 2), np.float32),
                "positions": spaces.Box(-1, 99, (self.SLOTS,), np.int64),
                "mask": spaces.MultiBinary(self.SLOTS),
                "layer": spaces.Discrete(1),
                "head": spaces.Discrete(2),
                "count": spaces.Discrete(self.SLOTS + 1),
            }
        )
        super().__init__(self.ROWS, observation, spaces.Box(-1, 1, (self.SLOTS,), np.float32))

    def reset(self) -> Any:
        rows = np.zeros(self.ROWS, np.int64)
        self.head = np.arange(self.ROWS) % 2
        self.features = self.rng.normal(size=(self.ROWS, self.SLOTS, 2)).astype(np.float32)
        positions = np.tile(np.arange(self.SLOTS), (self.ROWS, 1))
        mask = np.ones((self.ROWS, self.SLOTS), np.int8)
        return {
            "features": self.features, "positions": positions, "mask": mask,
            "layer": rows, "head": self.head, "count": rows + self.COUNT,
        }  # fmt: skip

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        gone = self.actions.argsort(axis=1)[:, : self.COUNT]
        positive = (np.take_along_axis(self.features[..., 0], gone, axis=1) > 0).sum(axis=1)
        reward = np.where(self.head == 0, -positive, positive).astype(np.float32)
        return self.reset(), reward, np.ones(self.ROWS, bool), [{} for _ in range(self.ROWS)]

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * self.ROWS

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return []

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.ROWS


def test_ppo_learns_what_can_be_learnt() -> None:
    env = Bandit()
    model = PPO(
        KVRankingPolicy, env, n_steps=16, batch_size=64, n_epochs=4, learning_rate=0.01, gamma=0.0, seed=0, device="cpu"
    )

    def mean_reward() -> float:
        return float(np.mean([env.step(model.predict(env.reset(), deterministic=False)[0])[1] for _ in range(8)]))

    assert abs(mean_reward()) < 0.3
    model.learn(256 * 30)
    assert mean_reward() > 0.9, "at most about 1.35 can be had where a head has three pairs of a kind"


class Many(gym.Env[np.ndarray, np.ndarray]):
    """Pays the mean of an action of n numbers."""

    def __init__(self, numbers: int) -> None:
        self.observation_space = spaces.Box(-1, 1, (16,), np.float32)
        self.action_space = spaces.Box(-1, 1, (numbers,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 16).astype(np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        observation = self.np_random.uniform(-1, 1, 16).astype(np.float32)
        return observation, float(action.mean()), bool(self.np_random.random() < 0.1), False, {}


def test_why_no_action_ranks_a_whole_model() -> None:
    """One probability for all heads: the figures in the documentation, with ``-s``."""
    kl = []
    for numbers in (64, 1024):
        model = PPO("MlpPolicy", Many(numbers), n_steps=256, seed=0, device="cpu").learn(256)
        kl.append(float(model.logger.name_to_value["train/approx_kl"]))
    print(f"approx_kl after one rollout: {kl[0]:.2g} with 64 numbers in an action, {kl[1]:.2g} with 1,024")
    assert kl[0] < 0.2
    assert kl[1] > 2
    with pytest.raises(ValueError, match="nan"):
        PPO("MlpPolicy", Many(8192), n_steps=256, seed=0, device="cpu").learn(256)


def test_the_policy_ranks_like_the_model() -> None:
    trained = learner()
    metrics = trained.update()
    assert {"rollout/ep_rew_mean", "loss/ppo", "loss/kl", "loss/entropy", "loss/grad_norm"} < set(metrics)
    assert {"time/env", "time/policy", "time/learn"} < set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    observation = trained.rows.reset()
    action, _ = trained.model.predict(observation, deterministic=True)
    np.testing.assert_array_equal(
        action.reshape(trained.env.action_space.shape), kvenv.policy_action(trained.env, trained.policy)
    )


def test_its_policy_saves_without_pickles_and_rolls_out(tmp_path: Path) -> None:
    policy = learner().policy
    policy.save_pretrained(tmp_path / "policy")
    options: dict[str, Any] = {"budget": BUDGET, "interval": INTERVAL, "protection": PROTECTION}
    losses = [
        rollout(each, [trace(0)], model=random_model(), **options).losses.nll
        for each in (policy, agents.make(tmp_path / "policy"))
    ]
    assert torch.equal(*losses)
    assert json.loads((tmp_path / "policy" / "policy.json").read_text())["training"]["learner"] == "ppo"
    assert (policy.model, policy.budgets, policy.interval) == (ModelIdentity.of(random_model()), (16, BUDGET), INTERVAL)


def test_a_restored_learner_never_stopped(tmp_path: Path) -> None:
    whole = learner()
    for _ in range(2):
        whole.update()
    save_checkpoint(tmp_path, whole.state(), whole.done)
    metrics = [whole.update() for _ in range(2)]
    torch.rand(3), np.random.rand(3)  # noqa: NPY002  nothing outside may matter
    resumed = learner()
    resumed.restore(load_checkpoint(tmp_path))
    again = [resumed.update() for _ in range(2)]
    for mine, theirs in zip(metrics, again, strict=True):
        assert {k: v for k, v in mine.items() if "time" not in k} == {
            k: v for k, v in theirs.items() if "time" not in k
        }
    ours, others = whole.state(), resumed.state()
    assert ours.values == others.values
    assert ours.tensors.keys() == others.tensors.keys()
    assert all(torch.equal(ours.tensors[name], others.tensors[name]) for name in ours.tensors)


def test_a_learner_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    learner().update()
    assert (torch.rand(1), np.random.rand()) == expected  # noqa: NPY002


def test_foreign_states_and_policies_are_refused(tmp_path: Path) -> None:
    trained = learner()
    with pytest.raises(ValueError, match="of learner 'grpo', not 'ppo'"):
        trained.restore(State({}, {"learner": "grpo"}))
    state = learner(hidden=8).state()
    with pytest.raises(ValueError, match="doesn't fit this policy"):
        trained.restore(state)
    learner(hidden=8).policy.save_pretrained(tmp_path)
    assert learner(hidden=8, init=str(tmp_path)).done == 0
    with pytest.raises(ValueError, match="this one's are"):
        learner(init=str(tmp_path))
    with pytest.raises(ValueError, match="'h2o' can't be gone on from"):
        learner(init="h2o")
    with pytest.raises(ValueError, match="output='numpy'"):
        PPOLearner(vector(autoreset_mode="SameStep", output="torch"))
    with pytest.raises(ValueError, match="exceed the environment's budget"):
        learner(budgets=(64,))


def test_it_starts_where_another_policy_ended(tmp_path: Path) -> None:
    first = learner()
    first.update()
    first.policy.save_pretrained(tmp_path)
    observation = first.rows.reset()
    second = learner(init=str(tmp_path), temperature=0.5, seed=1)
    np.testing.assert_array_equal(
        first.model.predict(observation, deterministic=True)[0],
        second.model.predict(observation, deterministic=True)[0],
    )
    torch.testing.assert_close(second.policy.scorer.last, 2 * first.policy.scorer.last)
