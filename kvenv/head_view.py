"""The vector environment as one row per (trace, layer, KV head)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from kvenv.vector_env import Array, KVEvictVectorEnv


class HeadView(VectorEnv[dict[str, Array], Array, Array]):
    """A KVEvictVectorEnv of N traces as N * L * H rows, one per (trace, layer, KV head) in this order.

    The form in which stock algorithms with one scalar log-probability per row are sound. A row's observation is
    ``features`` (C, F), ``positions`` (C,), ``mask`` (C,) and its ``layer`` and ``head``; its action ranks C slots; it
    is paid its trace's reward, ends with its trace and has its trace's info.

    Parameters
    ----------
    env : VectorEnv
        A KVEvictVectorEnv, or what ``gymnasium.make_vec`` made of it.

    Raises
    ------
    ValueError
        If it is another environment.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        if not isinstance(env.unwrapped, KVEvictVectorEnv) or env.unwrapped is not env:
            raise ValueError(f"env must be a KVEvictVectorEnv without wrappers, not {env}")
        self.env = env
        self.metadata, self.render_mode = env.metadata, env.render_mode
        self.autoreset_mode = self.metadata["autoreset_mode"]  # TorchRL asks for the enum
        layers, heads, slots, width = env.feature_shape
        self.traces, self.layers, self.heads = env.num_envs, layers, heads
        self.num_envs = env.num_envs * layers * heads
        largest = np.finfo(np.float32).max
        self.single_observation_space = spaces.Dict(
            {
                "features": spaces.Box(-largest, largest, (slots, width), np.float32),
                "positions": spaces.Box(-1, env.dynamics.limits.trace_length - 1, (slots,), np.int64),
                "mask": spaces.MultiBinary(slots),
                "layer": spaces.Discrete(layers),
                "head": spaces.Discrete(heads),
            }
        )
        self.single_action_space = spaces.Box(-1.0, 1.0, (slots,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        row = np.arange(self.num_envs)
        ids = {"layer": row // heads % layers, "head": row % heads}
        device = env.dynamics.tokens.device
        self._ids: dict[str, Array] = (
            {name: torch.as_tensor(x, device=device) for name, x in ids.items()} if env.output == "torch" else ids
        )

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Reset traces; seeds and options are per trace, ``reset_mask`` also per row if a trace's rows agree.

        Raises
        ------
        ValueError
            If a mask splits the rows of a trace, or as ``KVEvictVectorEnv.reset``.
        """
        mask = (options or {}).get("reset_mask")
        if isinstance(mask, np.ndarray) and mask.shape == (self.num_envs,):
            by_trace = mask.reshape(self.traces, -1)
            if (by_trace.any(axis=1) != by_trace.all(axis=1)).any():
                raise ValueError(
                    "option reset_mask splits the rows of a trace: its layers and heads are reset together"
                )
            options = {**(options or {}), "reset_mask": by_trace.any(axis=1)}
        observation, info = self.env.reset(seed=seed, options=options)
        return self._observation(observation), self._info(info)

    def step(self, actions: Array) -> tuple[dict[str, Array], Array, Array, Array, dict[str, Any]]:
        """Step with actions (N * L * H, C).

        Raises
        ------
        ValueError
            If the actions have another shape or contain NaN.
        """
        if tuple(actions.shape) != self.action_space.shape:
            raise ValueError(
                f"actions have shape {tuple(actions.shape)}: {self.action_space.shape} (N * L * H, C) was expected"
            )
        observation, *outcome, info = self.env.step(actions.reshape(self.env.action_space.shape))
        reward, terminated, truncated = (self._repeat(x) for x in outcome)
        return self._observation(observation), reward, terminated, truncated, self._info(info)

    def render(self) -> tuple[Any, ...] | None:
        """Return the frames of the traces."""
        return self.env.render()

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environment."""
        self.env.close(**kwargs)

    def __del__(self) -> None:
        """Leave the environment open: before gymnasium 1.3 a view that goes would close it, or miss it if refused."""

    def _repeat(self, x: Array) -> Array:
        """Give every row its trace's value."""
        copies = self.layers * self.heads
        return x.repeat_interleave(copies, dim=0) if isinstance(x, Tensor) else x.repeat(copies, axis=0)

    def _observation(self, observation: dict[str, Array]) -> dict[str, Array]:
        """Split the traces' observations by layer and head."""
        rows = {name: x.reshape(-1, *x.shape[3:]) for name, x in observation.items()}
        return rows | {name: x.clone() if isinstance(x, Tensor) else x.copy() for name, x in self._ids.items()}

    def _info(self, info: dict[str, Any]) -> dict[str, Any]:
        """Give every row its trace's info; evicted positions and final observations are the row's own."""
        rows = {name: self._info(x) if isinstance(x, dict) else self._repeat(x) for name, x in info.items()}
        if "evicted" in info:
            rows["evicted"] = info["evicted"].reshape(self.num_envs, -1)
        if "final_obs" in info:
            rows["final_obs"] = self._final(info["final_obs"])
        return rows

    def _final(self, final: np.ndarray) -> np.ndarray:
        """Split final observations (N,) of dicts by layer and head."""
        rows = np.full(self.num_envs, None, dtype=object)
        for row in range(self.num_envs):
            trace, layer, head = np.unravel_index(row, (self.traces, self.layers, self.heads))
            if final[trace] is not None:
                own = {name: x[layer, head] for name, x in final[trace].items()}
                rows[row] = own | {name: x[row] for name, x in self._ids.items()}
        return rows
