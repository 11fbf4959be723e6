"""Letting a policy act in the environment, the golden expert above all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvenv.golden import Reduce
from kvenv.identity import check_policy
from kvenv.ranking import action_from_order, eviction_order
from kvenv.state import LayerState

if TYPE_CHECKING:
    from kvenv.env import KVEvictEnv
    from kvenv.layerwise import Policy
    from kvenv.vector_env import KVEvictVectorEnv


@torch.no_grad()
def policy_action(env: KVEvictEnv | KVEvictVectorEnv, policy: Policy, reduce: Reduce = "max") -> Any:
    """Return the action with which a policy acts at the current decision: ranks, as ``action_from_order`` gives them.

    Parameters
    ----------
    env : KVEvictEnv or KVEvictVectorEnv
        Unwrapped.
    policy : Policy
        Ranks the pairs of one layer at a time.
    reduce : {"max", "sum"}
        Golden utility that a policy with the need ``future`` sees: ForesightKV's or KVP's.

    Returns
    -------
    array or Tensor (L, H, C), or (N, L, H, C) for the vector environment
        In the environment's action space.

    Raises
    ------
    ValueError
        If the environment can't give what the policy needs, see ``env.layer_states``, or the policy refuses its LLM.
    """
    vector: Any = env if hasattr(env, "num_envs") else env.vector
    check_policy(policy, vector.dynamics.model)
    actions = [
        action_from_order(eviction_order(policy(state), state.positions, state.mask), state.mask)
        for state in env.layer_states(policy.needs, reduce)
    ]
    action = torch.stack(actions, dim=1)
    if getattr(env, "output", "numpy") == "torch":
        return action
    array: np.ndarray = action.cpu().numpy()
    return array if vector is env else array[0]


class GoldenExpert:
    """Golden Eviction in the environment: acts with the knowledge of the full-cache run's future attention.

    Parameters
    ----------
    env : KVEvictEnv or KVEvictVectorEnv
        Unwrapped.
    reduce : {"max", "sum"}
        ForesightKV's utility (arXiv 2602.03203) or KVP's (arXiv 2602.10238).
    expected : bool
        Average the utility over 16 resampled continuations of the prefix, so that nothing is known that a causal policy
        couldn't: trace families only.
    """

    def __init__(self, env: KVEvictEnv | KVEvictVectorEnv, reduce: Reduce = "max", expected: bool = False) -> None:
        self.env, self.reduce = env, reduce
        self.name = "golden-expected" if expected else "golden"
        self._need = "expected_future" if expected else "future"
        self.needs = frozenset({self._need})

    def __call__(self, state: LayerState) -> Tensor:
        """Return the utilities (N, H, C) of a layer's pairs."""
        utility: Tensor = getattr(state, self._need)
        return utility

    def action(self) -> Any:
        """Return the expert's action at the current decision, see :func:`policy_action`."""
        return policy_action(self.env, self, self.reduce)
