"""Names: duplicates raise, unknown ones list the known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvenv.registry import Registry

ROOT = Path(__file__).resolve().parent.parent


def test_gives_back_what_was_registered() -> None:
    registry: Registry[int] = Registry("reward")
    registry.register("one", 1)
    registry.register("two", 2)
    assert registry.get("two") == 2
    assert registry.names() == ["one", "two"]
    assert "one" in registry
    assert "three" not in registry


def test_a_duplicate_raises_and_changes_nothing() -> None:
    registry: Registry[int] = Registry("reward")
    registry.register("one", 1)
    with pytest.raises(ValueError, match="reward 'one' is already registered"):
        registry.register("one", 2)
    assert registry.get("one") == 1


def test_a_reserved_name_raises_and_is_not_listed() -> None:
    registry: Registry[int] = Registry("model", reserved=("tiny",))
    with pytest.raises(ValueError, match="model 'tiny' is already registered"):
        registry.register("tiny", 1)
    assert registry.names() == []


@pytest.mark.parametrize(
    "call",
    [
        "kvenv.register_model('tiny', None)",
        "kvenv.register_traces('recall', len)",
        "kvenv.register_reward('lm_loss', len)",
        "kvenv.register_features('kv', len, 1)",
        "agents.register('h2o', len)",
        "agents.register('full', len)",
    ],
)
def test_a_built_in_name_is_taken_from_the_start(call: str) -> None:
    """In a fresh process, before anything was made: or the built-in one would find its own name taken later."""
    code = f"import agents, kvenv\ntry:\n    {call}\nexcept ValueError as error:\n    print(error)"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert "is already registered: choose another name" in said


def test_an_unknown_name_lists_the_known() -> None:
    registry: Registry[int] = Registry("feature set")
    registry.register("kv", 1)
    registry.register("stats", 2)
    with pytest.raises(ValueError, match="unknown feature set 'kw': known are kv, stats"):
        registry.get("kw")


def test_an_empty_name_raises() -> None:
    with pytest.raises(ValueError, match="empty"):
        Registry("model").register("", 1)
