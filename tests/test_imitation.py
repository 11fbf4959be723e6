"""Imitation must learn golden's order; a scorer must tell norms apart, save, load and refuse what isn't its own."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import agents
import kvenv
from agents.episodes import Episodes
from agents.imitation import ImitationConfig, ImitationLearner, Lesson, Student
from agents.ranking_losses import LOSSES, expected_cost, likelihood, listwise, pairwise_hinge, regression, team_cost
from agents.scorer import Scorer, ScorerPolicy
from kvenv.identity import ModelIdentity
from kvenv.layerwise import rollout
from kvenv.state import LayerState
from tests.environments import BUDGET, INTERVAL, LENGTH, MODEL, PROTECTION, RAGGED, trace
from tests.models import random_model


def imitator(**changes: object) -> ImitationLearner:
    """Return a learner on the small random model."""
    defaults = {"updates": 12, "num_traces": 4, "learning_rate": 1e-2, "budgets": (BUDGET,), "dagger": 0.0}
    source = kvenv.load_traces(RAGGED, tokenizer=None, trace_length=LENGTH)
    config = ImitationConfig(**{**defaults, **changes})  # type: ignore[arg-type]
    return ImitationLearner(kvenv.load_model(MODEL).model, source, config, interval=INTERVAL, protection=PROTECTION)


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


def decisions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores, utilities and candidates of a few decisions; the last has no candidate."""
    rng = np.random.default_rng(0)
    mask = rng.random((4, 7)) < 0.7
    mask[3] = False
    return rng.normal(size=(4, 7)), rng.random((4, 7)), mask


def test_the_expected_cost_is_the_mean_over_all_rankings() -> None:
    scores, utility, mask = decisions()
    costs = []
    for row in range(3):
        own, worth = scores[row][mask[row]], utility[row][mask[row]]
        ranks, total = np.arange(1, len(own) + 1), 0.0
        for order in itertools.permutations(range(len(own))):
            left = [np.exp(own[list(order[rank:])]) for rank in range(len(own))]
            probability = np.prod([weights[0] / weights.sum() for weights in left])
            total += probability * (ranks * worth[list(order)]).sum()
        costs.append(total / (ranks * np.sort(worth)[::-1]).sum())
    loss = expected_cost(*(torch.as_tensor(x) for x in (scores, utility, mask)))
    assert float(loss) == pytest.approx(np.mean(costs))


def test_heads_that_hold_other_positions_cost_what_each_costs_alone() -> None:
    scores, utility, mask = (torch.as_tensor(x)[None] for x in decisions())
    apart = torch.arange(28).view(1, 4, 7)
    torch.testing.assert_close(team_cost(scores, utility, mask, apart), expected_cost(scores, utility, mask))


def test_a_head_stands_in_for_another_as_far_as_it_attends_and_keeps() -> None:
    scores, utility, mask = (torch.as_tensor(x)[None] for x in decisions())
    rng = np.random.default_rng(1)
    positions = np.stack([rng.permutation(9)[:7] for _ in range(4)])
    positions[0, 6] = positions[1, 6] = -1
    mask[0, :2, 6] = False
    s, u, m = (x[0].numpy() for x in (scores, utility, mask))
    before = 1 / (1 + np.exp(s[:, :, None] - s[:, None, :])) * m[:, None, :]
    rank = 0.5 + before.sum(axis=-1)
    costs = []
    for head in range(3):
        cost = 0.0
        for i in np.flatnonzero(m[head]):
            missing = 1.0
            for other in {0, 1, 2, 3} - {head}:
                (j,) = (
                    np.flatnonzero(positions[other] == positions[head, i])
                    if positions[head, i] in positions[other]
                    else (None,)
                )
                if j is not None:
                    gone = rank[other, j] / m[other].sum() if m[other, j] else 0.0
                    missing *= 1 - min(1.0, u[other, j] / u[head, i]) * (1 - gone)
            cost += u[head, i] * rank[head, i] * missing
        best = np.sort(u[head][m[head]])[::-1]
        costs.append(cost / (np.arange(1, len(best) + 1) * best).sum())
    loss = team_cost(scores, utility, mask, torch.as_tensor(positions)[None])
    assert float(loss) == pytest.approx(np.mean(costs))
    assert float(loss) < 0.95 * float(expected_cost(scores, utility, mask))


def test_a_team_splits_what_both_heads_see() -> None:
    """Two heads, of which each can keep half: alone they would keep the same half."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, 8, generator=generator, dtype=torch.float64).requires_grad_()
    utility, mask = torch.ones(1, 2, 8, dtype=torch.float64), torch.ones(1, 2, 8, dtype=torch.bool)
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        team_cost(scores, utility, mask, torch.arange(8).expand(1, 2, 8)).backward()
        optimizer.step()
    kept = scores.detach()[0].topk(4, dim=-1).indices
    assert sorted(kept.flatten().tolist()) == list(range(8))


def test_regression_is_the_squared_error_of_centred_logarithms() -> None:
    scores, utility, mask = decisions()
    errors: list[float] = []
    for row in range(3):
        error = (scores[row] - np.log(utility[row] + 1e-4))[mask[row]]
        errors += list((error - error.mean()) ** 2)
    loss = regression(*(torch.as_tensor(x) for x in (scores, utility, mask)))
    assert float(loss) == pytest.approx(np.mean(errors))


def test_listwise_is_the_divergence_of_shares() -> None:
    scores, utility, mask = decisions()
    divergences = []
    for row in range(3):
        root, raw = np.sqrt(utility[row][mask[row]]) + 1e-6, np.exp(scores[row][mask[row]])
        golden, own = root / root.sum(), raw / raw.sum()
        divergences.append((golden * np.log(golden / own)).sum())
    loss = listwise(*(torch.as_tensor(x) for x in (scores, utility, mask)))
    assert float(loss) == pytest.approx(np.mean(divergences))


def test_likelihood_is_that_of_goldens_order_pick_by_pick() -> None:
    scores, utility, mask = decisions()
    total, picks = 0.0, 0
    for row in range(3):
        left = sorted(np.flatnonzero(mask[row]), key=lambda slot: utility[row, slot])
        while left:
            total += -scores[row, left[0]] - np.log(np.exp(-scores[row, left]).sum())
            left, picks = left[1:], picks + 1
    positions = torch.arange(7).expand(4, 7)
    loss = likelihood(*(torch.as_tensor(x) for x in (scores, utility, mask)), positions)
    assert float(loss) == pytest.approx(-total / picks)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_minimises_a_loss_is_in_goldens_order(loss: str) -> None:
    start, utility, mask = (torch.as_tensor(x)[None] for x in decisions())
    scores = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        LOSSES[loss](scores, utility, mask, torch.arange(28).view(1, 4, 7), 0.1).backward()
        optimizer.step()
    for row in range(3):
        assert torch.equal(scores[0, row][mask[0, row]].argsort(), utility[0, row][mask[0, row]].argsort())


@pytest.mark.parametrize("loss", LOSSES)
def test_imitation_learns_to_agree_with_golden(loss: str) -> None:
    learner, least = imitator(loss=loss), {"cost": 1.0}.get(loss, 0.0)
    before = agreement(learner)
    losses = [learner.update()["loss/ranking"] - least for _ in range(12)]
    assert np.mean(losses[-3:]) < 0.99 * np.mean(losses[:3])
    assert agreement(learner) > before + 0.03


def agreement(learner: ImitationLearner) -> float:
    """Return in which share of its evictions the policy agrees with golden, on traces drawn apart."""
    traces = learner.episodes.draw(np.random.default_rng(7), 8, BUDGET)
    future = learner.episodes.future(traces, BUDGET)
    return float(learner.episodes.play(learner.policy, traces, BUDGET, future=future, agreement=True).agreement.mean())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_trace_that_has_ended_teaches_nothing(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, learn, ended = imitator(loss=loss, power=1.0), Student.learn, 0

    def watched(student: Student, scores: torch.Tensor, state: LayerState, rate: float) -> Any:
        nonlocal ended
        scores.retain_grad()
        learnt = learn(student, scores, state, rate)
        over = ~(state.future > 0).any(dim=(1, 2))
        ended += int(over.sum())
        assert not scores.grad[over].any()
        return learnt

    monkeypatch.setattr(Student, "learn", watched)
    learner.update()
    assert ended, "no trace is shorter than another: the test sees nothing"


def shares(learner: ImitationLearner, monkeypatch: pytest.MonkeyPatch, updates: int) -> list[float]:
    """Return in which share of its evictions each update's episodes agreed with golden."""
    found, play = [], Episodes.play

    def watched(episodes: Episodes, *args: Any, **options: Any) -> Any:
        rollout = play(episodes, *args, **{**options, "agreement": True})
        found.append(float(rollout.agreement.mean()))
        return rollout

    monkeypatch.setattr(Episodes, "play", watched)
    for _ in range(updates):
        learner.update()
    return found


def test_golden_leads_or_with_dagger_the_scorer_in_a_share_of_the_traces_that_rises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert shares(imitator(), monkeypatch, 2) == [1, 1]
    dagger = shares(imitator(dagger=1.0, dagger_ramp=3), monkeypatch, 4)
    assert dagger[0] == 1
    assert dagger[3] < 0.9


def test_a_gradient_step_is_that_of_the_decision_and_of_its_layer_alone() -> None:
    learner = imitator()
    (student,), (other,) = learner.students, imitator().students
    states: list[LayerState] = []

    def keep(state: LayerState, order: torch.Tensor, count: torch.Tensor) -> None:
        if not states:
            states.append(replace(state, stats=state.stats.clone(), positions=state.positions.clone()))  # type: ignore[union-attr]

    traces = [trace(0), trace(1)]
    lesson = Lesson([other], torch.zeros(2, dtype=torch.bool), 1.0)
    learner.episodes.play(lesson, traces, BUDGET, future=learner.episodes.future(traces, BUDGET), on_eviction=keep)
    (state,), before = states, copy.deepcopy(student.scorer)
    student.learn(student.score(state), state, 1e-2)
    plain = copy.deepcopy(before)
    scores = plain(student.features.compute(state), 0)
    team_cost(scores, state.future**student.config.power, state.mask, state.positions).backward()  # type: ignore[operator]
    for name, weight in student.scorer.named_parameters():
        gradient, old = plain.get_parameter(name).grad, before.get_parameter(name)
        assert gradient is not None
        assert torch.equal(weight[1:], old[1:]), "another layer moved"
        # After one step the mean has forgotten ten elevenths of the initial weights.
        torch.testing.assert_close(student.mean.get_parameter(name), old + (weight - old) * 10 / 11)
        # Adam's first step is the step size along the gradient's sign.
        moved = gradient[0].abs() > 1e-5
        torch.testing.assert_close((weight - old)[0][moved], -1e-2 * gradient[0][moved].sign(), rtol=1e-2, atol=1e-5)


def test_budgets_are_drawn_per_update(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, play = set(), Episodes.play

    def watched(episodes: Episodes, policy: Any, traces: Any, budget: int, **options: Any) -> Any:
        seen.add(budget)
        return play(episodes, policy, traces, budget, **options)

    learner = imitator(budgets=(16, 20))
    monkeypatch.setattr(Episodes, "play", watched)
    for _ in range(6):
        learner.update()
    assert seen == {16, 20}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": ()}, r"budgets \(\) is impossible"),
        ({"dagger": 1.5}, "dagger 1.5 is no share"),
        ({"ema": -0.1}, "ema -0.1 is no share"),
        ({"loss": "rank"}, "unknown loss 'rank'"),
        ({"num_traces": 0}, "num_traces 0 is impossible"),
        ({"budgets": (200,)}, "budget 200"),
    ],
)
def test_impossible_hyper_parameters_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imitator(**changes)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_restored_learner_goes_on_bit_by_bit(stop: int) -> None:
    options = {"dagger": 0.5, "dagger_ramp": 4, "budgets": (16, 20)}
    straight, stopped, other = (imitator(**options) for _ in range(3))
    for learner, updates in ((straight, 4), (stopped, stop), (other, 2)):
        for _ in range(updates):
            learner.update()
    other.restore(stopped.state())
    assert other.done == stop
    for _ in range(4 - stop):
        other.update()
    one, two = straight.state(), other.state()
    assert one.values == two.values
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


def test_the_state_of_another_learner_is_refused() -> None:
    learner = imitator()
    state = learner.state()
    state.values["learner"] = "grpo"
    with pytest.raises(ValueError, match="of learner 'grpo', not 'imitation'"):
        learner.restore(state)
    with pytest.raises(ValueError, match="scorer doesn't fit this learner's"):
        imitator(hidden=7).restore(learner.state())


def test_training_twice_gives_the_same_policy() -> None:
    weights = []
    for _ in range(2):
        learner = imitator()
        for _ in range(2):
            learner.update()
        weights.append(learner.policy.scorer.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


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
    learner.policy.save_pretrained(tmp_path / "policy")
    policy = ScorerPolicy.from_pretrained(tmp_path / "policy")
    assert (policy.model, policy.budgets, policy.interval) == (ModelIdentity.of(random_model()), (BUDGET,), INTERVAL)
    options = {"model": random_model(), "budget": BUDGET, "interval": INTERVAL, "protection": PROTECTION}
    losses = [
        rollout(policy, [trace(0)], **options).losses.nll  # type: ignore[arg-type]
        for policy in (learner.policy, agents.make(tmp_path / "policy"))
    ]
    assert torch.equal(*losses)


def test_a_policy_of_another_model_is_refused() -> None:
    policy = ScorerPolicy(Scorer(1, 1, 7), "kv", name="foreign")
    options = {"model": random_model(), "budget": BUDGET, "interval": INTERVAL, "protection": PROTECTION}
    with pytest.raises(ValueError, match=r"'foreign' was trained for another .*: layers 1, not 2; kv_heads 1, not 2"):
        rollout(policy, [trace(0)], **options)  # type: ignore[arg-type]


def test_damaged_policies_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "policy"
    ScorerPolicy(Scorer(2, 2, 5), "kv").save_pretrained(directory)
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
    with pytest.raises(ValueError, match="is not a scorer policy's description"):
        agents.make(directory)
