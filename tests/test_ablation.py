"""Variants that learn side by side become what they would have become alone, and what was measured stays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.imitation import ImitationConfig
from agents.scorer import ScorerPolicy
from experiments import ablation, variants
from experiments.ablation import METRICS, Args
from experiments.variants import FAMILIES, VARIANTS, Terms, Variant

TERMS = Terms(updates=2, budget=48, batch=2, seed=1, init="imitation-tiny")


def weights(policy: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a learned policy."""
    assert isinstance(policy, ScorerPolicy)
    return policy.scorer.state_dict()


def test_a_student_becomes_what_it_would_have_become_alone() -> None:
    both = {"one": Variant({"dagger": 0.0}, "foresight"), "two": Variant({"dagger": 0.0, "loss": "cost"}, "foresight")}
    (together,) = variants.imitation(both, TERMS)
    (alone,) = variants.imitation({"two": both["two"]}, TERMS)
    one, two = weights(together["two"]), weights(alone["two"])
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_variants_of_grpo_start_from_the_same_policy_and_part() -> None:
    both = {"one": Variant({"group": 2}), "two": Variant({"group": 2, "credit": "trajectory"})}
    found = {name: weights(policy) for policies in variants.grpo(both, TERMS) for name, policy in policies.items()}
    assert list(found) == ["one", "two"]
    assert any(not torch.equal(found["one"][name], found["two"][name]) for name in found["one"])


def test_every_variant_has_a_name_of_its_own_and_changes_something() -> None:
    for learner, all_variants in VARIANTS.items():
        assert len({variant.name for variant in all_variants}) == len(all_variants), learner
    assert ImitationConfig().loss not in {variant.changes.get("loss") for variant in VARIANTS["imitation"]}


def test_what_was_measured_stays_and_the_best_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"golden": 0.1, "random": 3.0, "kv (seed 0)": 2.0, "kv, dagger 0.0 (seed 0)": 1.0}
    measured: list[str] = []

    def measure(policies: dict[str, Any], _: Args) -> dict[str, Any]:
        measured.extend(policies)
        row = dict.fromkeys(METRICS, 0.5)
        return {name: {family: row | {"answer_loss": losses[name]} for family in FAMILIES} for name in policies}

    def train(todo: dict[str, Variant], _: Terms) -> Iterator[dict[str, Any]]:
        yield dict.fromkeys(todo)

    monkeypatch.setattr(ablation, "RIVALS", ("golden", "random"))
    monkeypatch.setitem(VARIANTS, "imitation", [Variant({}, "kv"), Variant({"dagger": 0.0}, "kv")])
    monkeypatch.setitem(ablation.TRAINED, "imitation", train)
    monkeypatch.setattr(ablation, "measure", measure)
    for _ in range(2):
        ablation.main(["imitation", "--out", str(tmp_path)])
    assert measured == list(losses)
    assert list(json.loads((tmp_path / "imitation.json").read_text())["rows"]) == list(losses)
    names = [line.split(" | ")[0] for line in (tmp_path / "imitation.md").read_text().splitlines()[4:]]
    assert names == ["| golden", "| kv, dagger 0.0 (seed 0)", "| kv (seed 0)", "| random"]
    with pytest.raises(ValueError, match="choose another --out"):
        ablation.main(["imitation", "--out", str(tmp_path), "--updates", "7"])
