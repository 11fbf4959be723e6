"""Imitation must learn golden's order; a scorer must tell norms apart, save, load and refuse what isn't its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import agents
from agents.imitation import ImitationConfig, ImitationLearner, pairwise_hinge
from agents.scorer import Scorer, ScorerPolicy
from experiments import train
from kvenv.layerwise import rollout
from tests.environments import BUDGET, INTERVAL, PROTECTION, trace, vector
from tests.models import random_model


def imitator(**changes: object) -> ImitationLearner:
    """Return a learner on the small random environment."""
    env = vector(num_envs=4, output="torch", autoreset_mode="SameStep", features="foresight")
    return ImitationLearner(env, ImitationConfig(**{"updates": 40, "learning_rate": 1e-2, **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize("weighted", [True, False])
def test_the_loss_is_the_formula_pair_by_pair(weighted: bool) -> None:
    rng = np.random.default_rng(0)
    scores, utility, mask = rng.normal(size=(3, 7)), rng.random((3, 7)), rng.random((3, 7)) < 0.7
    total = weights = 0.0
    for row in range(3):
        for i in range(7):
            for j in range(7):
                if mask[row, i] and mask[row, j] and utility[row, i] > utility[row, j]:
                    weight = utility[row, i] ** 0.5 - utility[row, j] ** 0.5 if weighted else 1.0
                    total += weight * max(0.0, 0.2 - (scores[row, i] - scores[row, j]))
                    weights += weight
    loss = pairwise_hinge(*(torch.as_tensor(x) for x in (scores, utility, mask)), 0.2, weighted)
    assert float(loss) == pytest.approx(total / weights)


def test_imitation_learns_to_agree_with_golden() -> None:
    learner = imitator()
    losses = [learner.update()["loss/ranking"] for _ in range(40)]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


def test_training_twice_gives_the_same_policy() -> None:
    weights = []
    for _ in range(2):
        learner = imitator()
        for _ in range(3):
            learner.update()
        weights.append(learner.scorer.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_environment_that_returns_arrays_is_refused() -> None:
    with pytest.raises(ValueError, match="output='torch'"):
        ImitationLearner(vector(autoreset_mode="SameStep"))


def test_one_layer_is_scored_as_in_the_whole() -> None:
    scorer = Scorer(layers=3, heads=2, features=5)
    features = torch.randn(4, 3, 2, 9, 5)
    scorer.calibrate(features, torch.ones(4, 3, 2, 9, dtype=torch.bool))
    whole = scorer(features)
    for layer in range(3):
        torch.testing.assert_close(scorer(features[:, layer], layer), whole[:, layer])


def test_calibration_ignores_empty_slots_and_keeps_norms_apart() -> None:
    scorer, filled = Scorer(2, 2, 5), torch.zeros(4, 2, 2, 9, dtype=torch.bool)
    filled[..., :6] = True
    features = torch.randn(4, 2, 2, 9, 5)
    scorer.calibrate(features, filled)
    means = scorer.mean.clone()
    scorer.calibrate(torch.where(filled[..., None], features, 1e9), filled)
    torch.testing.assert_close(scorer.mean, means)
    assert not torch.allclose(scorer(features), scorer(2 * features), atol=1e-2), "doubled vectors look the same"


def test_a_saved_policy_decides_as_before(tmp_path: Path) -> None:
    learner = imitator()
    learner.update()
    learner.policy.save(tmp_path / "policy")
    options = {"model": random_model(), "budget": BUDGET, "interval": INTERVAL, "protection": PROTECTION}
    losses = [
        rollout(policy, [trace(0)], **options).losses.nll  # type: ignore[arg-type]
        for policy in (learner.policy, agents.make(tmp_path / "policy"))
    ]
    assert torch.equal(*losses)


def test_a_policy_of_another_model_is_refused() -> None:
    policy = ScorerPolicy(Scorer(1, 1, 7), "kv", name="foreign")
    options = {"model": random_model(), "budget": BUDGET, "interval": INTERVAL, "protection": PROTECTION}
    with pytest.raises(ValueError, match=r"'foreign' was trained for 1 layers x 1 KV heads"):
        rollout(policy, [trace(0)], **options)  # type: ignore[arg-type]


def test_damaged_policies_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "policy"
    ScorerPolicy(Scorer(2, 2, 5), "kv").save(directory)
    whole = (directory / "policy.safetensors").read_bytes()
    (directory / "policy.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"policy\.safetensors doesn't hold"):
        agents.make(directory)
    (directory / "policy.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        agents.make(directory)
    description = json.loads((directory / "policy.json").read_text())
    del description["shape"]
    (directory / "policy.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="is not a scorer's description"):
        agents.make(directory)


def test_the_command_leaves_a_policy_and_curves(tmp_path: Path) -> None:
    train.main(
        [
            "imitation", "--out", str(tmp_path), "--updates", "3", "--num-envs", "2", "--trace-length", "160",
            "--budget", "32", "--traces", "recall+tracking",
        ]
    )  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text())["learner"]["updates"] == 3
    assert agents.make(tmp_path / "policy").name == "imitation"
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/ranking")] == [0, 1, 2]
