"""Names: duplicates raise, unknown ones list the known."""

from __future__ import annotations

import pytest

from kvenv.registry import Registry


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


def test_an_unknown_name_lists_the_known() -> None:
    registry: Registry[int] = Registry("feature set")
    registry.register("kv", 1)
    registry.register("stats", 2)
    with pytest.raises(ValueError, match="unknown feature set 'kw': known are kv, stats"):
        registry.get("kw")


def test_an_empty_name_raises() -> None:
    with pytest.raises(ValueError, match="empty"):
        Registry("model").register("", 1)
