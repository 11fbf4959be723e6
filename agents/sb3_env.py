"""KVEvict-v0 as Stable-Baselines3 wants it: a VecEnv with one row per (trace, layer, KV head)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from kvenv.head_view import HeadView
from kvenv.vector_env import KVEvictVectorEnv

Observation = dict[str, np.ndarray]


def make_sb3_env(num_envs: int = 8, *, features: str = "stats", **arguments: Any) -> VecMonitor:
    """Return KVEvict-v0 for Stable-Baselines3: ``PPO(agents.KVRankingPolicy, agents.make_sb3_env(...)).learn(...)``.

    SB3 keeps every observation of a rollout, ``4 * F * C`` bytes and more per row and step: ``features="stats"`` is
    small, ``kv`` and ``foresight`` suit small models only.

    PPO's ratio is the exponential of a sum, over the W picks of a decision here, over the C numbers of a head's action
    under the stock Gaussian of ``MultiInputPolicy``, which runs here too. That is why there is no such environment with
    one action for the whole model: SB3's approx_kl after one rollout is 0.07 for 64 numbers, 120 for 1,024, and for
    8,192 the weights are NaN (``pytest -s tests/test_ppo.py -k whole_model``). For the same reason prefer a small
    ``interval``, and ``schedule="periodic"``: ``prefill`` evicts hundreds of pairs at once.

    Parameters
    ----------
    num_envs : int
        N traces decoded side by side; SB3 sees N * L * H environments.
    features : str
        Name of the feature set.
    **arguments
        The others of :class:`kvenv.KVEvictVectorEnv`, but ``output`` and ``autoreset_mode``.

    Returns
    -------
    VecMonitor
        Around a :class:`HeadVecEnv`, so that SB3 logs returns.

    Raises
    ------
    ValueError
        If an argument is unknown or impossible.
    """
    env = KVEvictVectorEnv(num_envs, features=features, output="numpy", autoreset_mode="SameStep", **arguments)
    return VecMonitor(HeadVecEnv(HeadView(env)))


class HeadVecEnv(VecEnv):
    """A :class:`kvenv.HeadView` with SB3's interface.

    An observation has one more entry than HeadView's: ``count``, how many pairs the coming step evicts, so that a
    policy knows how much of a ranking is executed. ``infos`` are one dict per row: its trace's metrics and the
    positions that the step evicted from its head.

    Parameters
    ----------
    env : HeadView
        Of an environment with ``output="numpy"`` and ``autoreset_mode="SameStep"``.

    Attributes
    ----------
    copies : int
        L * H, the rows of a trace.
    seconds : float
        Time spent in ``reset`` and ``step`` so far.
    """

    def __init__(self, env: HeadView) -> None:
        self.env, self.copies, self.seconds = env, env.num_envs // env.traces, 0.0
        self._actions: np.ndarray | None = None
        slots = env.env.feature_shape[2]
        own = cast(spaces.Dict, env.single_observation_space).spaces
        observation_space = spaces.Dict({**own, "count": spaces.Discrete(slots + 1)})
        super().__init__(env.num_envs, observation_space, env.single_action_space)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed the next reset: trace i gets seed + i, whatever the number of its rows."""
        first = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        self._seeds = [first + row // self.copies for row in range(self.num_envs)]
        return self._seeds

    def reset(self) -> Observation:
        """Start an episode in every row, with the seeds and options that were set for it.

        Raises
        ------
        ValueError
            If the options of a trace's rows differ, or as ``KVEvictVectorEnv.reset``.
        """
        began = time.perf_counter()
        options = {
            name: self._per_trace(f"option {name!r}", [row.get(name) for row in self._options])
            for name in {name for row in self._options for name in row}
        }
        seeds = self._per_trace("seed", self._seeds)
        observation, info = self.env.reset(seed=None if set(seeds) == {None} else seeds, options=options)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [_of_row(info, row) for row in range(self.num_envs)]
        self.seconds += time.perf_counter() - began
        return _with_count(observation, info["budget"])

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions (N * L * H, C) of the step."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step and return observations, rewards, dones and infos."""
        began = time.perf_counter()
        observation, reward, terminated, truncated, info = self.env.step(self._actions)
        done = terminated | truncated
        infos = [_of_row(info["final_info"] if done[row] else info, row) for row in range(self.num_envs)]
        for row in np.flatnonzero(done).tolist():
            infos[row]["TimeLimit.truncated"] = bool(truncated[row] and not terminated[row])
            infos[row]["terminal_observation"] = _with_count(info["final_obs"][row], info["final_info"]["budget"][row])
            self.reset_infos[row] = _of_row(info, row)
        self.seconds += time.perf_counter() - began
        return _with_count(observation, info["budget"]), reward.astype(np.float32), done, infos

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return the environment's attribute, once per row: all rows share one environment."""
        return [getattr(self.env.env, attr_name)] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set the environment's attribute.

        Raises
        ------
        ValueError
            If only some rows are meant.
        """
        if self._count(indices) < self.num_envs:
            raise ValueError(f"indices {indices!r} are some of {self.num_envs} rows: they share one environment")
        setattr(self.env.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Call the environment's method once and return its result once per row."""
        return [getattr(self.env.env, method_name)(*args, **kwargs)] * self._count(indices)

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """Return False for every row."""
        return [False] * self._count(indices)

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return one picture (height, width, 3) per trace, padded to one size: SB3 tiles them."""
        frames = self.env.render() or ()
        height, width = (max((frame.shape[axis] for frame in frames), default=0) for axis in (0, 1))
        return [np.pad(x, ((0, height - x.shape[0]), (0, width - x.shape[1]), (0, 0))) for x in frames]

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _count(self, indices: VecEnvIndices) -> int:
        """Return how many rows are meant."""
        return len(list(self._get_indices(indices)))

    def _per_trace(self, name: str, values: list[Any]) -> list[Any]:
        """Return each trace's value of what was given per row."""
        rows = [values[start : start + self.copies] for start in range(0, self.num_envs, self.copies)]
        for of_trace in rows:
            if any(value != of_trace[0] for value in of_trace):
                raise ValueError(f"{name} differs between the rows of a trace, {of_trace}: they run together")
        return [of_trace[0] for of_trace in rows]


def _with_count(observation: Observation, budget: np.ndarray) -> Observation:
    """Return HeadView's observation, of all rows or of one, with the number of pairs that the coming step evicts."""
    filled = (observation["positions"] >= 0).sum(axis=-1)
    return {**observation, "count": np.maximum(filled - budget, 0)}


def _of_row(info: dict[str, Any], row: int) -> dict[str, Any]:
    """Return what HeadView's info says of a row."""
    has = {name: mask for name, mask in info.items() if name.startswith("_")}
    return {name[1:]: info[name[1:]][row] for name, mask in has.items() if mask[row] and not name.startswith("_final")}
