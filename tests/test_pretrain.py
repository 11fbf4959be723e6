"""Pretraining: the first steps run, a killed run goes on bit by bit, bad arguments end in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.curriculum import ANSWER, IGNORED, curriculum
from experiments.pretrain import Arguments, Batches, Pretraining, check, main
from experiments.tiny_model import build_tokenizer

SMALL = (
    "--layers 1 --hidden 16 --heads 2 --kv-heads 1 --head-dim 8 --mlp 16 --tokens 300 --workers 0 --traces 1 "
    "--device cpu --save-every 3 --scale 0.001"
).split()


class KilledError(Exception):
    """Stands for the signal."""


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Return the weights of a run's model."""
    return {name: value.numpy() for name, value in load_file(folder / "model" / "model.safetensors").items()}


def test_killed_and_resumed_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(["--out", str(whole), *SMALL, "--final-steps", "3"])
    update = Pretraining.update

    def dies(self: Pretraining, batch: object) -> object:
        if self.at.step == 13:
            raise KilledError
        return update(self, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Pretraining, "update", dies)
        with pytest.raises(KilledError):
            main(["--out", str(parts), *SMALL, "--final-steps", "3"])
    checkpoint = json.loads((parts / "checkpoint" / "state.json").read_text())
    assert checkpoint["at"]["step"] == 12
    main(["--out", str(parts), *SMALL, "--final-steps", "3", "--resume"])
    one, two = weights(whole), weights(parts)
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert json.loads((whole / "checkpoint" / "state.json").read_text())["at"]["step"] == 20


def test_writes_a_model_directory_curves_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path), *SMALL, "--final-steps", "2"])
    printed = capsys.readouterr().out
    assert "reasoning" in printed
    assert f"tensorboard --logdir {tmp_path}" in "".join(printed.split("\n"))
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert sorted(file.suffix for file in (tmp_path / "checkpoint").iterdir()) == [
        ".json",
        ".safetensors",
        ".safetensors",
    ]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(tokenizer)


def test_batches_depend_on_seed_and_step_only() -> None:
    tokenizer = build_tokenizer()
    for lesson in curriculum(1.0, 10):
        batches = [Batches(lesson, tokenizer, seed, 2048)[step] for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3))]
        rows = [batch.tokens.tolist() for batch in batches]
        assert rows[0] == rows[1]
        assert rows[0] != rows[2]
        assert rows[0] != rows[3]
        assert batches[0].tokens.shape == batches[0].kinds.shape
        assert (batches[0].kinds == ANSWER).any()


def test_bare_pairs_ask_every_value_twice() -> None:
    tokenizer = build_tokenizer()
    batch = Batches(curriculum(1.0, 10)[0], tokenizer, 0, 292)[0]
    for tokens, kinds in zip(batch.tokens, batch.kinds, strict=True):
        assert set(kinds.tolist()) == {ANSWER, IGNORED}
        words = tokenizer.decode(tokens[1:]).split()
        told = dict(zip(words[:12:2], words[1:12:2], strict=True))
        asked = tokenizer.decode(tokens[kinds == ANSWER]).split()
        assert asked == [told[name] for name in words[12::2]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": 0}, "--layers is 0: choose 1 or more"),
        ({"heads": 3}, "--heads 3 is no multiple of --kv-heads 2"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0"),
        ({"device": "abacus"}, "--device abacus cannot be used here"),
        ({"resume": True}, "holds no checkpoint"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check(Arguments(out=tmp_path, **change))  # type: ignore[arg-type]


def test_a_checkpoint_is_neither_overwritten_nor_mixed_up(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), *SMALL, "--final-steps", "1"])
    with pytest.raises(ValueError, match="holds a checkpoint: add --resume"):
        main(["--out", str(tmp_path), *SMALL])
    with pytest.raises(ValueError, match="--seed is 1, the checkpoint has 0"):
        main(["--out", str(tmp_path), *SMALL, "--resume", "--seed", "1"])


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), *SMALL, "--final-steps", "1"])
    for path in (tmp_path / "checkpoint").iterdir():
        content = path.read_bytes()
        for damaged in (content[:-1], content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], b"{}"):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=path.name):
                main(["--out", str(tmp_path), *SMALL, "--final-steps", "1", "--resume"])
        path.write_bytes(content)
