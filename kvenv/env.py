"""KVEvict-v0 for one trace: the documentation page of the environment, and numpy at the boundary."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded

from kvenv.actions import priorities
from kvenv.golden import Reduce
from kvenv.snapshot import Snapshot
from kvenv.state import LayerState
from kvenv.vector_env import KVEvictVectorEnv

Observation = dict[str, np.ndarray]


class KVEvictEnv(gymnasium.Env[Observation, np.ndarray]):
    """A language model's key-value cache is too small for its trace: decide what goes.

    ## Description

    A frozen Hugging Face LLM decodes a trace, a known sequence of T tokens, with room for C pairs (key and value) in
    the cache of every (layer, KV head). When all slots are full, the agent ranks the cached pairs, the lowest-ranked
    are evicted, the next W tokens are fed, and the reward is how well the model predicted them. What is evicted is
    gone: the agent must foresee what the model will look for. The first ``sinks`` and the newest ``recent`` tokens
    are protected, the others are candidates. Evictions are per KV head; keys keep the rotary phase of their position.

    Under the schedule ``periodic`` (ForesightKV, arXiv 2602.03203) this happens every W = ``interval`` tokens, and C
    = ``budget`` + ``interval``. Under ``prefill`` (KVP, arXiv 2602.10238) it happens once: the prompt is fed, the one
    step evicts down to the budget and decodes the rest into further slots, which are neither observed nor evicted; C
    is the longest prompt of the split.

    Shapes: L layers, H KV heads, G query heads per KV head, C slots, D head dimension, F features.

    ## Action Space

    ``Box(-1, 1, (L, H, C), float32)``: a keep-priority for every slot. Only the order among the candidates of each
    (layer, KV head) counts: the lowest W go, or as many as exceed the budget; of equal ones the older first. Values
    outside the mask are ignored. NaN is an error. Emit ranks (``kvenv.ranking.action_from_order``) rather than raw
    scores, which libraries clip to the Box and so turn into ties.

    ## Observation Space

    A ``Dict``. The slot index means nothing: a new pair takes any free slot.

    | Name | Shape | Type | Min | Max | Meaning |
    | --- | --- | --- | --- | --- | --- |
    | features | (L, H, C, F) | float32 | -3.4e38 | 3.4e38 | the feature set, 0 in empty slots |
    | positions | (L, H, C) | int64 | -1 | ``trace_length`` - 1 | absolute position, -1 in empty slots |
    | mask | (L, H, C) | int8 | 0 | 1 | 1 where the pair is a candidate |

    | ``features`` | F | What |
    | --- | --- | --- |
    | ``kv`` | 2D + 1 | key, value, position (KVP's view) |
    | ``foresight`` | 2D + 8G | key, value, 8 attention statistics per query head (ForesightKV's view) |
    | ``pre-rope`` | 2D + 8G + 16 | the same, but keys without their rotary phase; norms, position and age |
    | ``stats`` | 12 | norms, position, age, the statistics averaged over the group: for stock RL libraries |

    The statistics are those of the attention that a pair got in the last window: max, min, sum over its queries, sums
    over its last 8, 16, 32 queries; and cumulative sum, and cumulative sum decayed by 0.9 per window. ``stats``
    brings everything to order 1 by logarithms.

    ``kvenv.register_features`` adds others. Bytes of an observation (``env.unwrapped.observation_nbytes``), at budget
    64 and interval 16 for the bundled LLM, at 1,024 and 256 for the others:

    | LLM | L × H × C | `stats` | `kv` | `foresight` |
    | --- | --- | --- | --- | --- |
    | tiny | 5 × 2 × 80 | 0.05 MB | 0.22 MB | 0.26 MB |
    | Qwen2.5-0.5B | 24 × 2 × 1,280 | 3.50 MB | 32.26 MB | 45.77 MB |
    | Qwen3-4B | 36 × 8 × 1,280 | 21.01 MB | 382.28 MB | 427.99 MB |
    | Qwen2.5-7B | 28 × 4 × 1,280 | 8.17 MB | 148.66 MB | 180.20 MB |

    Gymnasium's spaces keep bounds for every element, another 2.5 times that. What exceeds the machine's memory is
    refused when the environment is made.

    ## Rewards

    The step from position p is paid for the targets p + 1 ... p + W, which the freshly fed tokens predict. The tokens
    up to the first decision carry no reward. NLL is in nats.

    | ``reward`` | Paid |
    | --- | --- |
    | ``lm_loss`` | -(sum of the window's NLL) / W: the return is -(total NLL) / W |
    | ``lm_loss_increase`` | the same for NLL minus the full cache's NLL |
    | ``foresight`` | -(sum of increase² over low-entropy targets with increase > 1.5 nats) / (low-entropy targets) |
    | ``answer_loss`` | -(sum of the NLL of the window's answer tokens) / W |

    Low-entropy are the lower 80% of the episode's scored targets by full-cache entropy; their count is the episode's,
    so that the return is ForesightKV's reward. ``kvenv.register_reward`` adds others.

    ``info`` has every term by name, positive, per token: ``lm_loss``, and where the window holds answer tokens
    ``answer_loss`` and ``answer_accuracy``; if the reward needs the full cache or ``full_metrics`` is set, also
    ``full_lm_loss``, ``full_answer_loss``, ``full_entropy``, ``lm_loss_increase``, ``foresight``. The full cache
    costs one pass per trace. ``info`` also has ``trace``, ``budget``, ``rollout``, ``position`` (of the next token),
    ``active``, ``scored_tokens``, ``answer_tokens``, and ``evicted`` (L, H, E): the evicted positions in order, -1
    beyond a head's count.

    ## Starting State

    ``reset`` draws a trace from ``np_random`` and feeds it up to the first decision. ``options`` may name ``trace``
    (its id), ``budget`` (at most the environment's; the slots beyond stay empty) and ``rollout`` (the number that the
    noise hashes).

    ## Episode End

    1. Termination: the trace is decoded, after ceil((T - 1 - C) / W) steps under ``periodic``, one under ``prefill``.
       The last token is only a target; the last window may be short.
    2. Truncation: none, unless ``max_episode_steps`` is given to ``gymnasium.make``.

    A step after the end raises ``gymnasium.error.ResetNeeded``.

    ## Arguments

    All are JSON-able; models are loaded once per process.

    | Parameter | Type | Default | Description |
    | --- | --- | --- | --- |
    | ``model`` | str | ``"tiny"`` | the bundled LLM, a directory, a hub id, or a registered name |
    | ``traces`` | str | ``"recall"`` | a family, a ``.txt`` or ``.jsonl`` file, ``hf:<dataset>``, a registered name |
    | ``split`` | str | ``"train"`` | ``train``, ``validation`` or ``test`` |
    | ``trace_length`` | int | ``512`` | tokens of a trace, the most where traces differ |
    | ``budget`` | int | ``64`` | pairs that every (layer, KV head) keeps after an eviction |
    | ``interval`` | int | ``16`` | W, tokens decoded between two evictions |
    | ``schedule`` | str | ``"periodic"`` | or ``"prefill"`` |
    | ``sinks`` | int | ``4`` | first tokens that are never evicted |
    | ``recent`` | int | ``16`` | newest tokens that are never evicted |
    | ``protect_prompt`` | bool | ``False`` | never evict the prompt |
    | ``features`` | str | ``"kv"`` | feature set of the observation |
    | ``reward`` | str | ``"lm_loss"`` | what a step is paid |
    | ``full_metrics`` | bool | ``False`` | put the full cache's terms into ``info`` whatever the reward |
    | ``dtype`` | str | ``"float32"`` | of the LLM; a registered model keeps its own |
    | ``device`` | str | ``"cpu"`` | of the LLM; a registered model stays where it is |
    | ``deterministic`` | bool | ``False`` | the same bits in every run: calls :func:`kvenv.set_deterministic` |
    | ``render_mode`` | str | ``None`` | ``"ansi"`` or ``"rgb_array"``: heads × positions, what is kept |

    ```python
    import gymnasium as gym
    import kvenv

    env = gym.make("KVEvict-v0", traces="recall", budget=64)
    ```

    ## Vectorized environment

    ``gym.make_vec("KVEvict-v0", num_envs=N)`` runs N traces through one copy of the LLM
    (:class:`kvenv.KVEvictVectorEnv`), in all autoreset modes, on numpy arrays or on tensors of the model's device
    (``output="torch"``). ``kvenv.HeadView`` shows it as one row per (trace, layer, KV head). Don't ask for other
    vectorization: ``sync`` decodes one trace after another, ``async`` holds N copies of the LLM.

    ## Version History

    * v0: initial version.
    """

    metadata: dict[str, Any] = {
        name: value for name, value in KVEvictVectorEnv.metadata.items() if name != "autoreset_mode"
    }

    def __init__(
        self,
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
    ) -> None:
        self.vector = KVEvictVectorEnv(
            1,
            model=model,
            traces=traces,
            split=split,
            trace_length=trace_length,
            budget=budget,
            interval=interval,
            schedule=schedule,
            sinks=sinks,
            recent=recent,
            protect_prompt=protect_prompt,
            features=features,
            reward=reward,
            full_metrics=full_metrics,
            dtype=dtype,
            device=device,
            deterministic=deterministic,
            render_mode=render_mode,
            autoreset_mode="Disabled",
        )
        self.render_mode = render_mode
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space

    @property
    def observation_nbytes(self) -> int:
        """Bytes of an observation."""
        return self.vector.observation_nbytes

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; ``options`` knows ``trace``, ``budget`` and ``rollout``, see :class:`KVEvictVectorEnv`.

        Raises
        ------
        ValueError
            If the seed is negative, an option is unknown or impossible, or the trace can't be decoded with the budget.
            Then the environment is as it was before.
        """
        observation, info = self.vector.reset(seed=seed, options=options)
        self._np_random, self._np_random_seed = self.vector.np_random[0], self.vector.np_random_seed[0]
        return _first(observation), _only(info)

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Evict by the order of ``action`` (L, H, C), decode a window, pay for it.

        Raises
        ------
        ValueError
            If the action has another shape, holds anything but real numbers, or contains NaN.
        gymnasium.error.ResetNeeded
            If the episode is over, or none has begun.
        """
        ranked = priorities(action, self.vector.feature_shape[:3])
        if self.vector.dynamics.counters.finished[0]:
            raise ResetNeeded("the episode is over, or none has begun: call reset before step")
        observation, reward, terminated, truncated, info = self.vector.step(ranked[None])
        return _first(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), _only(info)

    def layer_states(self, needs: Collection[str] = (), reduce: Reduce = "max") -> Iterator[LayerState]:
        """Return what a policy sees at the current decision, layer by layer; see :class:`KVEvictVectorEnv`."""
        return self.vector.layer_states(needs, reduce)

    def track(self, needs: Collection[str]) -> None:
        """Follow more of the layers' states from now on; see :meth:`KVEvictVectorEnv.layer_states`."""
        self.vector.track(needs)

    def snapshot(self) -> Snapshot:
        """Return the environment's state, random generator included."""
        return self.vector.snapshot()

    def restore(self, snapshot: Snapshot) -> Observation:
        """Take the environment back to a snapshot and return the observation there.

        Raises
        ------
        ValueError
            If it was taken with other arguments, or isn't whole. Then the environment is as it was before.
        """
        observation = self.vector.restore(snapshot)
        self._np_random, self._np_random_seed = self.vector.np_random[0], self.vector.np_random_seed[0]
        return _first(observation)

    def render(self) -> Any:
        """Return a frame, heads × positions: a str (``ansi``) or an array (height, width, 3) (``rgb_array``).

        Raises
        ------
        gymnasium.error.ResetNeeded
            Before the first reset.
        """
        frames = self.vector.render()
        return None if frames is None else frames[0]


def _first(arrays: dict[str, np.ndarray]) -> Observation:
    """Return the only row."""
    return {name: x[0] for name, x in arrays.items()}


def _only(info: dict[str, Any]) -> dict[str, Any]:
    """Return the only row's info: what its masks say that it has, numbers as Python's."""
    values = {name: x[0] for name, x in info.items() if not name.startswith("_") and info[f"_{name}"][0]}
    return {name: x if isinstance(x, np.ndarray) else x.item() for name, x in values.items()}
