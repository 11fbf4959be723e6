"""KVRank-v0: rank recorded pairs once. The documentation page of the environment, and its reward."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from torch import Tensor

from kvenv.actions import priorities
from kvenv.checks import check_integer, check_options
from kvenv.features import feature_set
from kvenv.finite import check_finite
from kvenv.limits import observation_nbytes, refuse_what_cannot_fit
from kvenv.ranking import eviction_order
from kvenv.recording import RecordedTrace, sample
from kvenv.state import LayerState
from kvenv.store import TraceStore

Observation = dict[str, np.ndarray]

OPTIONS = ("trace", "cut")


def cost(ranked: Tensor) -> Tensor:
    """Return what rankings lose, summed over all budgets (KVP, arXiv 2602.10238): Σ r·I_σ(r).

    At a budget b the pairs of ranks above b go; over b = 0 ... n - 1 the pair of rank r goes r times.

    Parameters
    ----------
    ranked : Tensor (..., n)
        Utilities in ranked order, most useful first; zeros at the end are padding.

    Returns
    -------
    Tensor (...)
    """
    rank = torch.arange(1, ranked.shape[-1] + 1, device=ranked.device, dtype=ranked.dtype)
    return (ranked * rank).sum(dim=-1)


def least_cost(utility: Tensor) -> Tensor:
    """Return the cost (...) of the best ranking of utilities (..., n), at least 1e-8: the reward is -cost over it."""
    return cost(utility.sort(dim=-1, descending=True).values).clamp(min=1e-8)


class KVRankEnv(gymnasium.Env[Observation, np.ndarray]):
    """Rank the cached pairs of a recorded trace by how much attention the rest of the trace will pay them.

    ## Description

    The offline face of key-value cache eviction (KVP, arXiv 2602.10238). A trace was decoded once with the full cache,
    and it was recorded how much attention each pair got (``kvenv record``). An episode is one step: at a cut, n pairs
    are cached in every (layer, KV head); the agent ranks them; the reward says how much of the attention that the
    rest of the trace will pay goes to pairs that a cache of any size b < n would have lost. A ranking that is good at
    all budgets serves whatever budget ``KVEvict-v0`` or ``kvenv.rollout`` evicts down to. No LLM is run.

    Shapes: L layers, H KV heads, C slots, D head dimension, F features.

    ## Action Space

    ``Box(-1, 1, (L, H, C), float32)``: a keep-priority for every slot, as in ``KVEvict-v0``. Only the order among the
    filled slots of each (layer, KV head) counts; of equal ones the newer counts as more useful. NaN is an error. Emit
    ranks (``kvenv.ranking.action_from_order``) rather than raw scores, which libraries clip into ties.

    ## Observation Space

    A ``Dict``, as in ``KVEvict-v0``. C is the largest cut in the store.

    | Name | Shape | Type | Min | Max | Meaning |
    | --- | --- | --- | --- | --- | --- |
    | features | (L, H, C, F) | float32 | -3.4e38 | 3.4e38 | the feature set, 0 in empty slots |
    | positions | (L, H, C) | int64 | -1 | C - 1 | absolute position, -1 in empty slots |
    | mask | (L, H, C) | int8 | 0 | 1 | 1 where a pair is: every one is a candidate, none is protected |

    Of the feature sets those can be had that need no attention: ``kv`` (key, value, position; F = 2D + 1) and
    registered ones.

    ## Rewards

    With I the utility of a pair and r = 1 ... n the rank, most useful first: the mean over heads of

    -Σ r·I_σ(r) / max(Σ r·I_(r), 1e-8)

    where I_σ(r) is the utility of the pair that the action ranks r-th and I_(r) the r-th largest. -1 is the oracle.

    The utility is the store's: the attention that the trace's queries from the cut on will pay to the pair, either its
    largest mean over a window and the group of query heads (ForesightKV's, ``kvenv record``'s default), or its sum over
    queries of the largest in the group (KVP's, ``--utility sum``).

    ``info`` has ``trace`` (index in the store), ``cut`` and ``name`` of the trace, and after the step ``head_reward``
    (L, H), the reward of every head.

    ## Starting State

    ``reset`` draws a trace of the store and one of its cuts, all equally likely, from ``np_random``. Cuts are the
    multiples of the store's interval that leave at least one future token. ``options`` may name ``trace`` (its index
    in the store) and ``cut``.

    ## Episode End

    Termination after one step; no truncation. A second step raises ``gymnasium.error.ResetNeeded``.

    ## Arguments

    All are JSON-able.

    | Parameter | Type | Default | Description |
    | --- | --- | --- | --- |
    | ``store`` | str | ``None`` | directory of a trace store; if not given, 4 short traces are recorded from ``tiny`` |
    | ``features`` | str | ``"kv"`` | feature set of the observation |
    | ``heads`` | list | ``None`` | [[layer, head], ...]: only these, as L = their number and H = 1 |

    ```python
    import gymnasium as gym
    import kvenv

    env = gym.make("KVRank-v0")  # tries the environment; to train, store="runs/store"
    ```

    ## Version History

    * v0: initial version.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        *,
        store: str | None = None,
        features: str = "kv",
        heads: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if not (store is None or isinstance(store, (str, os.PathLike))):
            raise ValueError(f"store must be a directory, not {store!r}")
        self.store: Sequence[RecordedTrace] = sample() if store is None else TraceStore(store)
        if not len(self.store):
            raise ValueError(f"store {store!r} has no traces: record some with `kvenv record`")
        self.features = feature_set(features)
        if self.features.needs:
            raise ValueError(
                f"features {features!r} read {', '.join(sorted(self.features.needs))}, which a store doesn't have: "
                "choose features that need nothing, e.g. 'kv'"
            )
        layers, kv_heads = self.store[0].keys.shape[:2]
        self.heads = _heads(heads, layers, kv_heads)
        shape = (layers, kv_heads) if heads is None else (len(self.heads), 1)
        slots = max(trace.cuts[-1] for trace in self.store)
        width = self.features.compute(_state(self.store[0], 0, self.store[0].cuts[0])).shape[-1]
        self.feature_shape = (*shape, slots, width)
        refuse_what_cannot_fit(1, self.observation_nbytes, features, torch.device("cpu"))
        largest = np.finfo(np.float32).max
        self.observation_space = spaces.Dict(  # type: ignore[assignment]  # its samples are plain dicts
            {
                "features": spaces.Box(-largest, largest, self.feature_shape, np.float32),
                "positions": spaces.Box(-1, slots - 1, self.feature_shape[:3], np.int64),
                "mask": spaces.MultiBinary(self.feature_shape[:3]),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, self.feature_shape[:3], np.float32)
        self._at: tuple[int, int] | None = None

    @property
    def observation_nbytes(self) -> int:
        """Bytes of an observation."""
        return observation_nbytes(*self.feature_shape)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw a trace and a cut; ``options`` may name ``trace`` and ``cut``.

        Raises
        ------
        ValueError
            If the seed is negative, an option is unknown, or there is no such trace or cut. Then the environment is as
            it was before.
        FloatingPointError
            If utilities or features of the trace are NaN or infinite; likewise.
        """
        given = check_options(options, OPTIONS)
        if seed is not None:
            check_integer("seed", seed, 0)
        fresh = (self.np_random, self.np_random_seed) if seed is None else seeding.np_random(seed)
        generator = fresh[0]
        state = generator.bit_generator.state
        try:
            number = _number("trace", given, generator.integers(len(self.store)))
            if not 0 <= number < len(self.store):
                raise ValueError(f"trace {number} isn't in the store: it has {len(self.store)}, the first is 0")
            trace = self.store[number]
            cut = _number("cut", given, generator.choice(trace.cuts))
            utility, observation = self._utilities(trace, cut), self._observe(trace, cut)
            for what, x in (("utilities", utility), ("features", observation["features"])):
                check_finite(what, x[None], lambda: [trace.name])
        except (ValueError, FloatingPointError):
            generator.bit_generator.state = state
            raise
        self._np_random, self._np_random_seed = fresh
        self._utility, self._observation = utility, observation
        self._at = (number, cut)
        return self._copy(), self._info(number, cut)

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Rank the pairs by ``action`` (L, H, C).

        Raises
        ------
        ValueError
            If the action has another shape, holds anything but real numbers, or contains NaN.
        gymnasium.error.ResetNeeded
            If the episode is over, or none has begun.
        """
        if self._at is None:
            raise ResetNeeded("the episode is over, or none has begun: call reset before step")
        ranked_by = priorities(action, self.feature_shape[:3])
        positions, mask = (torch.from_numpy(self._observation[name]) for name in ("positions", "mask"))
        order = eviction_order(ranked_by, positions, mask.bool())
        (number, cut), self._at = self._at, None
        ranked = self._utility.gather(-1, order[..., :cut].flip(-1))
        head_reward = -cost(ranked) / least_cost(self._utility)
        info = self._info(number, cut) | {"head_reward": head_reward.numpy()}
        return self._copy(), float(head_reward.mean()), True, False, info

    def _utilities(self, trace: RecordedTrace, cut: int) -> Tensor:
        """Return the utilities (L, H, n) of the chosen heads, in float64."""
        return self._chosen(trace.utility_at(cut)).double()

    def _observe(self, trace: RecordedTrace, cut: int) -> Observation:
        """Return the observation of the first ``cut`` pairs: slot i holds position i, further slots are empty."""
        layers, kv_heads = trace.keys.shape[:2]
        slots = self.feature_shape[2]
        positions = torch.arange(slots).where(torch.arange(slots) < cut, -1)
        features = torch.zeros(layers, kv_heads, *self.feature_shape[2:])
        for layer in {layer for layer, _ in self.heads}:
            features[layer, :, :cut] = self.features.compute(_state(trace, layer, cut))[0]
        shape = self.feature_shape[:3]
        return {
            "features": self._chosen(features).numpy(),
            "positions": positions.expand(shape).numpy().copy(),
            "mask": (positions >= 0).to(torch.int8).expand(shape).numpy().copy(),
        }

    def _chosen(self, x: Tensor) -> Tensor:
        """Return the chosen heads of ``x`` (L, H, ...) as (L, H, ...), or (their number, 1, ...) if some were named."""
        layers, kv_heads = zip(*self.heads, strict=True)
        return x[list(layers), list(kv_heads)].unflatten(0, self.feature_shape[:2])

    def _copy(self) -> Observation:
        return {name: x.copy() for name, x in self._observation.items()}

    def _info(self, number: int, cut: int) -> dict[str, Any]:
        return {"trace": number, "cut": cut, "name": self.store[number].name}


def _heads(heads: Sequence[Sequence[int]] | None, layers: int, kv_heads: int) -> list[tuple[int, int]]:
    """Return the chosen heads as pairs (layer, KV head), all if None."""
    if heads is None:
        return [(layer, head) for layer in range(layers) for head in range(kv_heads)]
    chosen = [
        tuple(pair) if isinstance(pair, Sequence) else (pair,)
        for pair in (heads if isinstance(heads, Sequence) else [heads])
    ]
    known = {(layer, head) for layer in range(layers) for head in range(kv_heads)}
    integers = all(type(number) is int for pair in chosen for number in pair)
    if not integers or not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= known:
        raise ValueError(
            f"heads {[list(pair) for pair in chosen]} must be different pairs [layer, KV head] with layers 0 to "
            f"{layers - 1} and KV heads 0 to {kv_heads - 1}, at least one"
        )
    return [(layer, head) for layer, head in chosen]


def _number(name: str, options: Mapping[str, Any], drawn: Any) -> int:
    """Return an option, or what was drawn where it isn't given."""
    value = options.get(name)
    if value is None:
        return int(drawn)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"option {name} must be an integer, not {value!r}")
    return int(value)


def _state(trace: RecordedTrace, layer: int, cut: int) -> LayerState:
    """Return one layer's cache after ``cut`` tokens of a trace, nothing protected."""
    keys, values = (x[layer, None, :, :cut] for x in (trace.keys, trace.values))
    positions = torch.arange(cut).expand(keys.shape[:3])
    filled = torch.ones_like(positions, dtype=torch.bool)
    now, none = torch.tensor([cut]), torch.tensor([0])
    return LayerState(
        layer=layer,
        keys=keys,
        values=values,
        positions=positions,
        groups=1,  # no query was recorded
        mask=filled,
        filled=filled,
        next_position=now,
        prompt_length=none,
        budget=now,
        interval=trace.interval,
        rotary=trace.rotary,
    )
