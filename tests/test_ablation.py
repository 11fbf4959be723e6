"""Variants that learn side by side become what they would have become alone, and what was measured stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.scorer import ScorerPolicy
from experiments import ablation
from experiments.ablation import Args, Variant

ARGS = Args("imitation", updates=2, batch=2, num_traces=1)


def test_a_student_becomes_what_it_would_have_become_alone() -> None:
    golden = {"dagger": 0.0}
    variants = [Variant("foresight", golden), Variant("foresight", {**golden, "loss": "listwise", "inputs": "raw"})]
    together = ablation.train(variants, ARGS, seed=1)[1]
    (alone,) = ablation.train(variants[1:], ARGS, seed=1)
    assert isinstance(alone, ScorerPolicy)
    assert isinstance(together, ScorerPolicy)
    one, two = together.scorer.state_dict(), alone.scorer.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_was_measured_stays_and_the_best_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"golden": 0.1, "random": 3.0, "kv (seed 0)": 2.0, "foresight, dagger 0.0 (seed 0)": 1.0}
    measured: list[str] = []

    def measure(policies: dict[str, Any], _: Args) -> dict[str, Any]:
        measured.extend(policies)
        row = dict.fromkeys(("answer_accuracy", "agreement_with_golden"), 0.5)
        return {
            name: {family: row | {"answer_loss": losses[name]} for family in ablation.FAMILIES} for name in policies
        }

    monkeypatch.setattr(ablation, "RIVALS", ("golden", "random"))
    monkeypatch.setattr(ablation, "VARIANTS", [Variant("kv", {}), Variant("foresight", {"dagger": 0.0})])
    monkeypatch.setattr(ablation, "train", lambda variants, *_: [None] * len(variants))
    monkeypatch.setattr(ablation, "measure", measure)
    for _ in range(2):
        ablation.main(["imitation", "--out", str(tmp_path)])
    assert measured == list(losses)
    assert list(json.loads((tmp_path / "imitation.json").read_text())["rows"]) == list(losses)
    names = [line.split(" | ")[0] for line in (tmp_path / "imitation.md").read_text().splitlines()[4:]]
    assert names == ["| golden", "| foresight, dagger 0.0 (seed 0)", "| kv (seed 0)", "| random"]
    with pytest.raises(ValueError, match="choose another --out"):
        ablation.main(["imitation", "--out", str(tmp_path), "--updates", "7"])
