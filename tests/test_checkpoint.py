"""Checkpoints are whole or absent, damage is named, and the newest that can be read wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agents.checkpoint import KEPT, checkpoints, load_checkpoint, optimizer_state, restore_optimizer, save_checkpoint
from agents.learner import State


def state(step: int) -> State:
    """Return a small state."""
    return State({"weights": torch.full((3, 2), float(step)), "step": torch.tensor(step)}, {"done": step, "of": [1, 2]})


def write(directory: Path, *steps: int) -> None:
    """Write a checkpoint of each step."""
    for step in steps:
        save_checkpoint(directory, state(step), step)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    write(tmp_path, 7)
    loaded = load_checkpoint(tmp_path)
    assert loaded.values == {"done": 7, "of": [1, 2]}
    assert torch.equal(loaded.tensors["weights"], state(7).tensors["weights"])
    assert loaded.tensors["step"].shape == ()


def test_the_newest_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 2, 10, 9, 100)
    assert [int(path.name) for path in checkpoints(tmp_path)] == [10, 100]
    assert KEPT == 2


def damage(path: Path, kind: str) -> None:
    """Damage a checkpoint."""
    tensors, values = path / "state.safetensors", path / "state.json"
    if kind == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-5])
    elif kind == "a flipped bit":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif kind == "no tensors":
        tensors.unlink()
    elif kind == "truncated values":
        values.write_text(values.read_text()[:-3])
    elif kind == "foreign values":
        values.write_text('{"epoch": 3}')
    elif kind == "a list":
        values.write_text("[1, 2]")


DAMAGES = ["truncated tensors", "a flipped bit", "no tensors", "truncated values", "foreign values", "a list"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(tmp_path: Path, kind: str) -> None:
    write(tmp_path, 1, 2)
    damage(tmp_path / "00000002", kind)
    with pytest.warns(UserWarning, match="00000002: .*; going on from 00000001"):
        assert load_checkpoint(tmp_path).values["done"] == 1
    damage(tmp_path / "00000001", kind)
    with pytest.raises(ValueError, match=r"no checkpoint can be read: .*00000002: "):
        load_checkpoint(tmp_path)


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / "00000002" / "state.json").unlink()
    assert load_checkpoint(tmp_path).values["done"] == 1
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_restored_optimizer_steps_as_the_first_would() -> None:
    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (parameter**3).sum().backward()
        optimizer.step()

    first = torch.nn.Parameter(torch.arange(3.0))
    one = torch.optim.Adam([first], lr=0.1)
    step(first, one)
    second = torch.nn.Parameter(first.detach().clone())
    two = torch.optim.Adam([second], lr=0.1)
    restore_optimizer(two, optimizer_state(one))
    step(first, one)
    step(second, two)
    assert torch.equal(first, second)
