"""The policies that come with the package load by name and are worth having."""

from __future__ import annotations

import numpy as np
import pytest

import agents
from kvenv.evaluation import Row, evaluate
from kvenv.models import load_model
from kvenv.traces import load_traces


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Return the rows of all of them, and of random, on a few validation traces of each family."""
    policies = {name: agents.make(name) for name in (*agents.TRAINED, "random")}
    loaded = load_model("tiny")
    source = load_traces("recall+tracking+dialogue+reasoning", split="validation", tokenizer=loaded.tokenizer)
    batches = evaluate(policies, source, range(16), model=loaded.model, budgets=(64,))
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("name", agents.TRAINED)
def test_a_trained_policy_answers_better_than_random(name: str, rows: list[Row]) -> None:
    policy = agents.make(name)
    assert policy.name == name
    assert policy.training["learner"] == name.removesuffix("-tiny")  # type: ignore[attr-defined]
    losses = {who: np.mean([row.answer_loss for row in rows if row.policy == who]) for who in (name, "random")}
    assert losses[name] < losses["random"] - 0.3
