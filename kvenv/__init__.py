"""Learned KV-cache eviction for Hugging Face language models, as a Gymnasium environment.

Importing kvenv registers its environments; PyTorch and transformers are imported when one is made.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import gymnasium

from kvenv.registry import register_features, register_model, register_reward, register_traces
from kvenv.traces import Trace, load_traces

if TYPE_CHECKING:
    from kvenv.determinism import set_deterministic
    from kvenv.env import KVEvictEnv
    from kvenv.expert import GoldenExpert, policy_action
    from kvenv.generation import EvictingCache, restore
    from kvenv.head_view import HeadView
    from kvenv.layerwise import rollout
    from kvenv.models import load_model
    from kvenv.rank_env import KVRankEnv
    from kvenv.state import LayerState
    from kvenv.store import TraceStore
    from kvenv.vector_env import KVEvictVectorEnv

__all__ = [
    "EvictingCache",
    "GoldenExpert",
    "HeadView",
    "KVEvictEnv",
    "KVEvictVectorEnv",
    "KVRankEnv",
    "LayerState",
    "Trace",
    "TraceStore",
    "load_model",
    "load_traces",
    "policy_action",
    "register_features",
    "register_model",
    "register_reward",
    "register_traces",
    "restore",
    "rollout",
    "set_deterministic",
]

try:
    __version__ = version("kvenv")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

# Public name -> the module that defines it, imported on first use.
_LAZY = {
    "EvictingCache": "kvenv.generation",
    "GoldenExpert": "kvenv.expert",
    "HeadView": "kvenv.head_view",
    "KVEvictEnv": "kvenv.env",
    "KVEvictVectorEnv": "kvenv.vector_env",
    "KVRankEnv": "kvenv.rank_env",
    "LayerState": "kvenv.state",
    "TraceStore": "kvenv.store",
    "load_model": "kvenv.models",
    "policy_action": "kvenv.expert",
    "restore": "kvenv.generation",
    "rollout": "kvenv.layerwise",
    "set_deterministic": "kvenv.determinism",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def _register_environments() -> None:
    """Register the ids once; entry points are strings, so that specs are JSON and nothing heavy is imported.

    Neither is ``nondeterministic``. A step adds nothing atomically, on CUDA either: pairs are written and evicted by
    slot, each slot once; what is sorted has no ties; kvenv's kernels, PyTorch's reductions, and cuBLAS on one stream
    give equal bits for equal inputs. ``tests/test_determinism.py`` and ``tests/test_gpu.py`` hold it to that.
    """
    if "KVEvict-v0" not in gymnasium.registry:
        gymnasium.register(
            id="KVEvict-v0",
            entry_point="kvenv.env:KVEvictEnv",
            vector_entry_point="kvenv.vector_env:KVEvictVectorEnv",
        )
    if "KVRank-v0" not in gymnasium.registry:
        gymnasium.register(id="KVRank-v0", entry_point="kvenv.rank_env:KVRankEnv")


_register_environments()
