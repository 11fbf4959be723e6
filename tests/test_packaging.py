"""Importing kvenv is light, its ids are registered, and what the package promises is there."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest

import kvenv

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> str:
    """Run ``code`` in a fresh interpreter and return what it printed."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_import_is_light() -> None:
    heavy = python(
        "import sys, kvenv, agents\n"
        "dir(kvenv), kvenv.__version__, kvenv.register_reward\n"
        "print(*{'torch', 'transformers', 'stable_baselines3', 'matplotlib'} & set(sys.modules))"
    )
    assert heavy.split() == []


def test_the_spec_is_json_and_names_strings() -> None:
    spec = json.loads(gym.spec("KVEvict-v0").to_json())
    assert spec["entry_point"] == "kvenv.env:KVEvictEnv"
    assert spec["vector_entry_point"] == "kvenv.vector_env:KVEvictVectorEnv"
    assert spec["kwargs"] == {}


def test_reloading_registers_nothing_twice(recwarn: pytest.WarningsRecorder) -> None:
    before = gym.registry["KVEvict-v0"]
    importlib.reload(kvenv)
    assert gym.registry["KVEvict-v0"] is before
    assert [str(warning.message) for warning in recwarn] == []


def test_the_id_with_its_module_needs_no_import() -> None:
    assert python("import gymnasium as gym; print(gym.make('kvenv:KVEvict-v0').spec.id)").strip() == "KVEvict-v0"


@pytest.mark.parametrize("name", kvenv.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert name in dir(kvenv)
    assert getattr(kvenv, name).__name__ == name


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'KVEvict'"):
        _ = kvenv.KVEvict


def test_arrows_point_one_way() -> None:
    """kvenv imports neither agents nor experiments; agents never imports experiments."""
    for package, forbidden in (("kvenv", "agents|experiments"), ("agents", "experiments")):
        for path in (ROOT / package).rglob("*.py"):
            found = re.findall(rf"^\s*(?:from|import) (?:{forbidden})\b.*", path.read_text(), re.MULTILINE)
            assert not found, f"{path}: {found}"


def test_the_constraints_allow_what_pyproject_asks_for() -> None:
    """Every direct dependency, development tools included, is pinned to a version inside its range: all but Triton."""
    from packaging.requirements import Requirement

    # tomllib is new in Python 3.11; the lists are plain enough for a regular expression.
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|dev) = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in lists for _, line in re.findall(r"""^    (["'])(.+?)\1,""", block, re.MULTILINE)]
    wanted = [Requirement(line) for line in lines]
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            pin = Requirement(line)
            pinned[pin.name.lower().replace("_", "-")] = str(pin.specifier).removeprefix("==")
    assert len(wanted) > 15
    # A PyTorch for CUDA asks for a version of Triton of its own: another pin would make it impossible to install.
    assert {requirement.name for requirement in wanted if requirement.name not in pinned} == {"triton"}
    for requirement in wanted:
        pin = pinned.get(requirement.name)
        assert pin is None or pin in requirement.specifier, f"{requirement}: pinned {pin}"
    assert not [version for version in pinned.values() if "+" in version], "a local suffix matches one build only"
