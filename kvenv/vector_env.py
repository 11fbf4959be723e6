"""KVEvict-v0 for N traces at once, through one copy of the LLM: the Gymnasium face of :mod:`kvenv.dynamics`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gymnasium import logger, spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from kvenv import rewards
from kvenv.actions import priorities
from kvenv.checks import check_choice, check_flag, check_integer, check_options
from kvenv.determinism import set_deterministic
from kvenv.dynamics import Dynamics
from kvenv.features import feature_set
from kvenv.finite import check_finite
from kvenv.golden import Reduce
from kvenv.limits import Limits, observation_nbytes
from kvenv.models import load_model
from kvenv.registry import REWARDS
from kvenv.render import RENDER_MODES, render_ansi, render_rgb
from kvenv.snapshot import Snapshot
from kvenv.state import LayerState, Protection
from kvenv.traces import SCHEDULES, load_traces

Array = Any
"""A numpy array under ``output="numpy"``, a tensor on the model's device under ``output="torch"``."""

OUTPUTS = ("numpy", "torch")
OPTIONS = ("trace", "budget", "rollout", "reset_mask")
"""What ``reset(options=...)`` knows."""


class KVEvictVectorEnv(VectorEnv[dict[str, Array], Array, Array]):
    """N rows of :class:`kvenv.KVEvictEnv`, whose docstring is the page of the environment.

    Rows to be reset are prefilled together, those rows only. Seeded by an int s, row i equals the single environment
    seeded by s + i; a list has a seed of each row.

    Parameters
    ----------
    num_envs : int
        N.
    model, traces, split, trace_length, budget, interval, schedule, sinks, recent, protect_prompt, features, reward,
    full_metrics, dtype, device, deterministic, render_mode
        As in :class:`kvenv.KVEvictEnv`.
    autoreset_mode : str or AutoresetMode
        "NextStep" (the step after the end resets the row, its action is ignored and it is paid 0), "SameStep" (the last
        observation is ``info["final_obs"]``, the last info ``info["final_info"]``), or "Disabled": finished rows idle,
        are paid 0 and keep their flags, ``info["active"]`` False, until ``reset(options={"reset_mask": mask})``.
    output : {"numpy", "torch"}
        What observations, rewards, flags and info's values are: arrays, or tensors on the model's device. Masks in info
        (``_name``) and what the host counts (trace ids, tokens, ...) are always arrays. NaN and infinity are refused in
        arrays; at tensors nobody looks, since a step would wait for the device: NaN logits show as a NaN reward there.
    max_episode_steps : int, optional
        Truncate episodes after so many steps.
    cuda_graph : bool
        Capture eviction, decoding and observation in CUDA graphs when they are first due, which takes a few calls, and
        replay them from then on: for small LLMs, whose steps otherwise wait for Python. Needs a CUDA device and the
        schedule ``periodic``, takes the memory of a step and of an observation for good. Features of one's own must ask
        the device nothing.

    Raises
    ------
    ValueError
        If an argument is unknown or impossible.
    """

    metadata: dict[str, Any] = {
        "render_modes": list(RENDER_MODES),
        "render_fps": 2,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        model: str = "tiny",
        traces: str = "recall",
        split: str = "train",
        trace_length: int = 512,
        budget: int = 64,
        interval: int = 16,
        schedule: str = "periodic",
        sinks: int = 4,
        recent: int = 16,
        protect_prompt: bool = False,
        features: str = "kv",
        reward: str = "lm_loss",
        full_metrics: bool = False,
        dtype: str = "float32",
        device: str = "cpu",
        deterministic: bool = False,
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = "NextStep",
        output: str = "numpy",
        max_episode_steps: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        if deterministic:
            set_deterministic()
        check_choice("schedule", schedule, SCHEDULES)
        check_choice("output", output, OUTPUTS)
        check_choice("render_mode", render_mode, (None, *RENDER_MODES))
        self.autoreset_mode: str = _mode_name(autoreset_mode)
        for name, flag in (
            ("protect_prompt", protect_prompt),
            ("full_metrics", full_metrics),
            ("cuda_graph", cuda_graph),
        ):
            check_flag(name, flag)
        check_integer("num_envs", num_envs, 1)
        if max_episode_steps is not None:
            check_integer("max_episode_steps", max_episode_steps, 1)
        self.num_envs, self.output, self.render_mode = num_envs, output, render_mode
        self.features, self.reward, self.full_metrics = features, reward, full_metrics
        self.max_episode_steps = max_episode_steps
        self.metadata = {**self.metadata, "autoreset_mode": AutoresetMode(self.autoreset_mode)}
        protection = Protection(sinks, recent, protect_prompt)
        limits = Limits(trace_length, budget, interval, schedule == "periodic", protection)
        self._reward = REWARDS.get(reward)
        loaded = load_model(model, dtype=dtype, device=device)
        source = load_traces(
            traces, split=split, tokenizer=loaded.tokenizer, trace_length=trace_length, schedule=schedule
        )
        self.dynamics = Dynamics(
            loaded,
            source,
            rows=num_envs,
            limits=limits,
            features=feature_set(features),
            cuda_graph=cuda_graph,
        )
        self._make_spaces()
        self._generators: tuple[np.random.Generator, ...] = ()
        self._seeds: tuple[int, ...] = ()
        self._begun = np.zeros(num_envs, np.int64)

    @property
    def feature_shape(self) -> tuple[int, int, int, int]:
        """L, H, C, F."""
        return self.dynamics.feature_shape

    @property
    def observation_nbytes(self) -> int:
        """Bytes of one row's observation."""
        return observation_nbytes(*self.feature_shape)

    @property  # type: ignore[override]  # one per row, as SyncVectorEnv
    def np_random(self) -> tuple[np.random.Generator, ...]:
        """Each row's random generator."""
        if not self._generators:
            self._seed([None] * self.num_envs, range(self.num_envs))
        return self._generators

    @np_random.setter
    def np_random(self, value: tuple[np.random.Generator, ...]) -> None:
        self._generators, self._seeds = tuple(value), (-1,) * self.num_envs

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """What each row's generator was seeded with."""
        return self._seeds

    @property
    def spec(self) -> EnvSpec | None:
        """How ``gymnasium.make_vec`` made this environment."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        # A spec must be JSON, an enum is not.
        if spec is not None and "autoreset_mode" in spec.kwargs:
            spec.kwargs["autoreset_mode"] = self.autoreset_mode
        self._spec = spec

    _spec: EnvSpec | None = None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Start episodes.

        Parameters
        ----------
        seed : int or sequence of int, optional
            Row i gets seed + i, or its own. A row that isn't seeded goes on with its generator.
        options : dict, optional
            ``trace``: id of the trace, ``budget``: a budget up to the environment's, ``rollout``: the number that the
            noise hashes (otherwise the row's count of episodes since it was seeded); each an int or one per row, for
            this episode only. ``reset_mask``: numpy bool (N,), the rows to reset.

        Raises
        ------
        ValueError
            If a seed is negative, an option is unknown or impossible, a trace can't be decoded with its budget, or the
            first reset leaves out rows. Then the environment is as it was before.
        """
        given = check_options(options, OPTIONS)
        rows = np.flatnonzero(self._reset_mask(given.get("reset_mask")))
        if isinstance(seed, (int, np.integer)):
            seed = [int(seed) + i for i in range(self.num_envs)]
        seeds = self._row_values("seed", seed, 0, None)
        values = {name: self._row_values(name, given.get(name)) for name in ("trace", "budget", "rollout")}
        with self._unless_refused():
            _ = self.np_random
            self._seed(seeds, rows)
            self._begin(rows, **values)
        info = self._episode_info()
        info |= _masked({"active": ~self.dynamics.counters.finished}, np.ones(self.num_envs, np.bool_))
        return self._observe(), info

    def step(self, actions: Array) -> tuple[dict[str, Array], Array, Array, Array, dict[str, Any]]:
        """Evict by the order of ``actions`` (N, L, H, C), decode a window, pay for it.

        Returns
        -------
        observation : dict
            What :meth:`reset` returns, at the next decision.
        reward, terminated, truncated : array (N,)
            As in :class:`kvenv.KVEvictEnv`.
        info : dict
            A value (N, ...) of each name, and a mask ``_name`` (N,) of the rows that have it.

        Raises
        ------
        ValueError
            If the actions have another shape, hold anything but real numbers, or contain NaN: no step is taken then.
        FloatingPointError
            Under ``output="numpy"``, if a reward or a feature is NaN or infinite, with the trace. All rows are to be
            reset then.
        MemoryError
            If memory runs out, with how many rows of how many tokens. All rows are to be reset then.
        gymnasium.error.ResetNeeded
            Before the first reset.
        """
        now = self.dynamics.counters
        self._refuse_before_reset("step")
        ranked = priorities(actions, (self.num_envs, *self.feature_shape[:3]), self.dynamics.tokens.device)
        idle, start = now.finished.copy(), now.position.copy()
        window, evicted = self.dynamics.advance(ranked.transpose(0, 1))
        if self.max_episode_steps is not None:
            self.dynamics.truncate(np.flatnonzero(~now.finished & (now.steps >= self.max_episode_steps)))
        reward = self._pay(window)
        info = self._step_info(window, evicted, ~idle, start)
        ended = now.finished & ~idle
        if self.autoreset_mode == "NextStep":
            self._begin(np.flatnonzero(idle))
            terminated, truncated = self._flags()
        elif self.autoreset_mode == "SameStep" and ended.any():
            terminated, truncated = self._flags()
            info = self._finish(ended, info)
            self._begin(np.flatnonzero(ended))
        else:
            terminated, truncated = self._flags()
        info = self._episode_info() | info | _masked({"active": ~idle}, np.ones(self.num_envs, np.bool_))
        return self._observe(), reward, terminated, truncated, info

    def layer_states(self, needs: Collection[str] = (), reduce: Reduce = "max") -> Iterator[LayerState]:
        """Return what a policy sees at the current decision of every row, layer by layer.

        Parameters
        ----------
        needs : collection of str
            Optional parts, see :data:`kvenv.state.NEEDS`. What must be followed from the first token on (``stats``,
            ``last_attention``, ``queries``, ``query_moments``) can be asked for first right after a reset of all rows.
        reduce : {"max", "sum"}
            Golden utility: ForesightKV's or KVP's.

        Raises
        ------
        ValueError
            If a need is unknown, wasn't followed, or can't be had from these traces.
        gymnasium.error.ResetNeeded
            Before the first reset.
        """
        self._refuse_before_reset("layer_states")
        return self.dynamics.layer_states(needs, reduce)

    def track(self, needs: Collection[str]) -> None:
        """Follow more of the layers' states from now on; see :meth:`layer_states`."""
        self.dynamics.track(needs)

    def snapshot(self) -> Snapshot:
        """Return the state of all rows, random generators included."""
        generators = tuple(generator.bit_generator.state for generator in self.np_random)
        return replace(self.dynamics.snapshot(), generators=generators, begun=self._begun.copy(), seeds=self._seeds)

    def restore(self, snapshot: Snapshot) -> dict[str, Array]:
        """Take all rows back to a snapshot and return the observation there.

        Raises
        ------
        ValueError
            If it was taken with other arguments, or isn't whole. Then the environment is as it was before.
        """
        if not isinstance(snapshot, Snapshot):
            raise ValueError(f"a snapshot of snapshot() is needed, not {type(snapshot).__name__}")
        snapshot.check_arguments(self.dynamics.arguments())
        snapshot.check_randomness(self.np_random)
        self.dynamics.restore(snapshot)
        for generator, state in zip(self.np_random, snapshot.generators, strict=True):
            generator.bit_generator.state = state
        self._begun, self._seeds = snapshot.begun.copy(), snapshot.seeds
        return self._observe()

    def render(self) -> tuple[Any, ...] | None:
        """Return one frame per row: a str (``ansi``) or an array (``rgb_array``), heads × positions.

        Raises
        ------
        gymnasium.error.ResetNeeded
            Before the first reset.
        """
        if self.render_mode is None:
            logger.warn("render was called without a render_mode: give one to gymnasium.make, e.g. 'ansi'")
            return None
        self._refuse_before_reset("render")
        now, cache = self.dynamics.counters, self.dynamics.cache
        draw = render_ansi if self.render_mode == "ansi" else render_rgb
        positions = cache.positions.transpose(0, 1).cpu().numpy()
        candidates = cache.candidates().transpose(0, 1).cpu().numpy()
        return tuple(
            draw(positions[row], candidates[row], seen=int(now.position[row]), length=int(now.last[row]) + 1)
            for row in range(self.num_envs)
        )

    def _refuse_before_reset(self, call: str) -> None:
        """Refuse a call that has no meaning before all rows were reset."""
        if (self.dynamics.counters.trace < 0).any():
            raise ResetNeeded(f"call reset before {call}: no episode has begun")

    def _make_spaces(self) -> None:
        """Make the spaces."""
        largest, shape = np.finfo(np.float32).max, self.feature_shape[:3]
        self.single_observation_space = spaces.Dict(
            {
                "features": spaces.Box(-largest, largest, self.feature_shape, np.float32),
                "positions": spaces.Box(-1, self.dynamics.limits.trace_length - 1, shape, np.int64),
                "mask": spaces.MultiBinary(shape),
            }
        )
        self.single_action_space = spaces.Box(-1.0, 1.0, shape, np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    @contextmanager
    def _unless_refused(self) -> Iterator[None]:
        """Take seeds and draws back if what is done with them fails."""
        generators, seeds, begun = self._generators, self._seeds, self._begun.copy()
        states = [generator.bit_generator.state for generator in generators]
        try:
            yield
        except Exception:
            for generator, state in zip(generators, states, strict=True):
                generator.bit_generator.state = state
            self._generators, self._seeds, self._begun = generators, seeds, begun
            raise

    def _seed(self, seeds: Sequence[int | None], rows: Sequence[int] | np.ndarray) -> None:
        """Seed the generators and the noise of those rows that get a seed, or have none yet."""
        seeded = {row: seeding.np_random(seeds[row]) for row in rows if seeds[row] is not None or not self._generators}
        now = [seeded.get(row) or (self._generators[row], self._seeds[row]) for row in range(self.num_envs)]
        self._generators, self._seeds = tuple(x for x, _ in now), tuple(x for _, x in now)
        self._begun[list(seeded)] = 0

    def _begin(
        self,
        rows: np.ndarray,
        trace: Sequence[int | None] = (),
        budget: Sequence[int | None] = (),
        rollout: Sequence[int | None] = (),
    ) -> None:
        """Begin an episode in some rows; values that aren't given are drawn or counted."""
        if not len(rows):
            return
        size, most = self.dynamics.source.size or 2**31, self.dynamics.limits.budget
        traces = [_given(trace, row, lambda row: self._generators[row].integers(size)) for row in rows]
        budgets = [_given(budget, row, lambda row: most) for row in rows]
        rollouts = [_given(rollout, row, lambda row: self._begun[row]) for row in rows]
        if max(budgets) > most:
            raise ValueError(f"option budget {max(budgets)} exceeds the environment's budget {most}")
        # Seeds of any size give 63 bits of noise seed.
        self.dynamics.begin(rows, traces, budgets, [self._seeds[row] % 2**63 for row in rows], rollouts)
        self._begun[rows] += 1

    def _reset_mask(self, mask: np.ndarray | None) -> np.ndarray:
        """Check the option ``reset_mask`` (N,); all rows where it isn't given."""
        everyone = np.ones(self.num_envs, np.bool_)
        if mask is None:
            return everyone
        if (
            not isinstance(mask, np.ndarray)
            or mask.dtype != np.bool_
            or mask.shape != (self.num_envs,)
            or not mask.any()
        ):
            raise ValueError(
                f"option reset_mask must be a numpy bool array of shape ({self.num_envs},) with a True, not {mask!r}"
            )
        if (self.dynamics.counters.trace[~mask] < 0).any():
            raise ValueError(f"option reset_mask {mask} leaves out rows that were never reset: reset all rows first")
        return mask

    def _row_values(
        self, name: str, value: Any, least: int = -(2**63), most: int | None = 2**63 - 1
    ) -> list[int | None]:
        """Return one int or None per row of an argument that is None, an int or a sequence."""
        several = isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim == 1)
        values = list(value) if several else [value] * self.num_envs
        if len(values) != self.num_envs or not all(x is None or isinstance(x, (int, np.integer)) for x in values):
            raise ValueError(f"{name} must be an integer or {self.num_envs} of them, not {value!r}")
        numbers = [None if x is None else int(x) for x in values]
        for number in numbers:
            if number is not None and (number < least or (most is not None and number > most)):
                raise ValueError(f"{name} {number} must be at least {least}" + (f" and at most {most}" if most else ""))
        return numbers

    def _pay(self, window: rewards.WindowLosses) -> Array:
        """Return the reward (N,), 0 for rows that idled."""
        if self.full_metrics:
            _ = window.full
        reward = self._reward(window)
        if not isinstance(reward, Tensor) or reward.shape != (self.num_envs,):
            raise ValueError(
                f"reward {self.reward!r} returned {getattr(reward, 'shape', type(reward).__name__)}: a tensor of shape "
                f"({self.num_envs},) was expected"
            )
        reward = torch.where(window.valid.any(dim=1), reward, 0.0)
        if self.output == "torch":
            return reward
        paid = reward.double().cpu().numpy()
        check_finite(f"rewards {self.reward!r}", paid, self._names)
        return paid

    def _observe(self) -> dict[str, Array]:
        """Return the observation of every row."""
        observation = self._present(self.dynamics.observe())
        if self.output == "numpy":
            check_finite(f"features {self.features!r}", observation["features"], self._names)
        return observation

    def _names(self) -> list[str]:
        """Return the names of the rows' traces."""
        return [self.dynamics.source[int(trace)].name for trace in self.dynamics.counters.trace]

    def _flags(self) -> tuple[Array, Array]:
        """Return terminated and truncated (N,)."""
        now = self.dynamics.counters
        if self.output == "numpy":
            return now.finished & ~now.truncated, now.truncated.copy()
        finished, truncated = self.dynamics.finished, self.dynamics.truncated
        return finished & ~truncated, truncated.clone()

    def _present(self, tensors: dict[str, Tensor]) -> dict[str, Array]:
        """Return tensors as this environment's kind of array."""
        return tensors if self.output == "torch" else {name: x.cpu().numpy() for name, x in tensors.items()}

    def _episode_info(self) -> dict[str, Any]:
        """Return what is known of the episodes that rows are in."""
        now = self.dynamics.counters
        values = {name: getattr(now, name).copy() for name in ("trace", "budget", "rollout", "position")}
        return _masked(values, np.ones(self.num_envs, np.bool_))

    def _step_info(
        self, window: rewards.WindowLosses, evicted: Tensor, active: np.ndarray, start: np.ndarray
    ) -> dict[str, Any]:
        """Return what came of a step that rows ``active`` began at positions ``start``."""
        position = self.dynamics.counters.position
        answers = self.dynamics.answers(start, position)
        info = _masked({"scored_tokens": position - start, "answer_tokens": answers}, active)
        terms = self._present(rewards.per_token(window))
        for name, value in terms.items():
            info |= _masked({name: value}, active & (answers > 0) if "answer" in name else active)
        return info | _masked(self._present({"evicted": evicted.contiguous()}), active)

    def _finish(self, ended: np.ndarray, info: dict[str, Any]) -> dict[str, Any]:
        """Move what belongs to rows that ended into ``final_obs`` and ``final_info``."""
        observation = self._observe()
        final = np.full(self.num_envs, None, dtype=object)
        for row in np.flatnonzero(ended):
            final[row] = {name: value[row] for name, value in observation.items()}
        last = {
            name: value & ended if name.startswith("_") else value
            for name, value in (info | self._episode_info()).items()
        }
        kept = {name: value & ~ended if name.startswith("_") else value for name, value in info.items()}
        return kept | _masked({"final_obs": final, "final_info": last}, ended)


def _mode_name(mode: str | AutoresetMode) -> str:
    """Return an autoreset mode by name."""
    name = mode.value if isinstance(mode, AutoresetMode) else mode
    check_choice("autoreset_mode", name, [known.value for known in AutoresetMode])
    return str(name)


def _given(values: Sequence[int | None], row: int, otherwise: Callable[[int], Any]) -> int:
    """Return a row's value, or what holds where none is given."""
    value = values[row] if len(values) else None
    return int(otherwise(row) if value is None else value)


def _masked(values: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """Return info values with the masks of the rows that have them."""
    return values | {f"_{name}": mask.copy() for name in values}
