"""GRPO: evictions replay exactly, the gradient is the plain one at constant memory, and what is rewarded is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import agents
import kvenv
from agents.attention_credit import attention_credit
from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.grpo import Advantages, Experience, GRPOConfig, GRPOLearner
from agents.learner import State
from agents.ranking_policy import Evictions, ReplayPolicy, SamplingPolicy
from agents.returns import CREDITS, group_advantages, rollout_metrics, rollout_sums, target_advantages
from agents.scorer import Scorer, ScorerPolicy
from kvenv.expert import policy_action
from kvenv.identity import ModelIdentity
from kvenv.layerwise import rollout
from kvenv.registry import REWARDS
from kvenv.traces import Trace, TraceSource
from kvenv.traces.user import ListSource
from tests.environments import BUDGET, INTERVAL, LENGTH, MODEL, PROTECTION, RAGGED, trace, vector
from tests.models import random_model, random_tokens
from tests.reference import masked_run

GROUP = 3


def learner(source: TraceSource | None = None, **changes: Any) -> GRPOLearner:
    """Return a learner on the small random model."""
    defaults = {"num_traces": 2, "group": GROUP, "budgets": (BUDGET,), "hidden": 4, "temperature": 1.0}
    config = GRPOConfig(**{**defaults, **changes})
    source = source or kvenv.load_traces(RAGGED, tokenizer=None, trace_length=LENGTH)
    model = kvenv.load_model(MODEL).model
    return GRPOLearner(model, source, config, interval=INTERVAL, protection=PROTECTION, features="stats")


def perturbed(changed: GRPOLearner, scale: float = 0.3) -> GRPOLearner:
    """Move a learner's weights off those that it made its rollouts with."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in changed.scorer.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return changed


def gradients(of: GRPOLearner) -> list[torch.Tensor]:
    """Return the gradient of every weight."""
    return [parameter.grad.clone() for parameter in of.scorer.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("credit", ["trajectory", "window"])
def test_advantages_are_the_formula(credit: str) -> None:
    reward = np.random.default_rng(0).normal(size=(6, 4))
    expected = np.zeros_like(reward)
    for first in (0, 3):
        for window in range(4):
            start = 0 if credit == "trajectory" else window
            to_go = [sum(reward[row, start:]) for row in range(first, first + 3)]
            returns = [sum(reward[row]) for row in range(first, first + 3)]
            expected[first : first + 3, window] = (to_go - np.mean(to_go)) / np.std(returns)
    np.testing.assert_allclose(group_advantages(torch.as_tensor(reward), 3, credit), expected, atol=1e-12)


def test_rollouts_that_are_paid_alike_teach_nothing() -> None:
    reward = torch.tensor([[0.1, 0.3], [0.3, 0.1 + 1e-9], [0.0, 0.0], [0.0, 0.0]])
    assert not group_advantages(reward, 2).any()


@pytest.mark.parametrize("reward", ["lm_loss", "lm_loss_increase", "answer_loss", "foresight"])
def test_a_target_is_paid_its_share_of_what_the_rollout_is_paid_beyond_the_others(reward: str) -> None:
    experience = learner(reward=reward, temperature=0.2).collect(0)
    windows, rows = experience.windows, len(experience.traces)
    found = target_advantages(REWARDS.get(reward), windows, rows, GROUP)
    returns = experience.reward.sum(dim=1).view(-1, GROUP)
    spread = returns.std(dim=1, correction=0).repeat_interleave(GROUP)[:, None]
    slope = {
        "answer_loss": -windows.answer.double() / INTERVAL,
        "foresight": -2 * windows.increase * (windows.spikes > 0) / windows.full.low_entropy_count[:, None],
    }.get(reward, -torch.ones_like(windows.nll) / INTERVAL)
    loss = windows.nll.reshape(-1, GROUP, found.shape[1])
    beyond = (loss - loss.mean(dim=1, keepdim=True)).flatten(0, 1)
    expected = torch.where(spread > 1e-6, slope.reshape(rows, -1) * beyond * INTERVAL / spread, 0.0)
    torch.testing.assert_close(found, expected)
    if reward == "lm_loss":
        paid = (returns - returns.mean(dim=1, keepdim=True)).flatten() / spread[:, 0]
        torch.testing.assert_close(found.sum(dim=1) / INTERVAL, paid)


def test_rewards_that_no_target_can_be_paid_by_are_refused() -> None:
    windows = learner().collect(0).windows
    with pytest.raises(ValueError, match=r"differentiable function of losses\.nll"):
        target_advantages(lambda losses: losses.correct.sum(dim=1).float(), windows, 2 * GROUP, GROUP)


def test_a_pick_is_credited_with_what_its_absence_cost_those_who_would_have_looked() -> None:
    one = learner()
    experience = one.collect(0)
    rows, first = len(experience.traces), BUDGET + INTERVAL
    paid = torch.randn(rows, experience.reward.shape[1] * INTERVAL, generator=torch.Generator().manual_seed(0))
    found = attention_credit(one.episodes.model, experience.traces[::GROUP], experience.evictions, paid, first)
    for row in (0, rows - 1):
        tokens = torch.as_tensor(experience.traces[row].tokens)[None, :-1]
        for layer, attention in enumerate(masked_run(random_model(), experience.traces[row].tokens).attention):
            heads = one.scorer.shape[1]
            of_group = torch.as_tensor(attention).unflatten(0, (heads, -1)).mean(dim=1).float()
            expected = torch.zeros(heads, LENGTH)
            for window, went in enumerate(experience.evictions.positions[layer]):
                after = slice(first + window * INTERVAL, tokens.shape[1])
                weights = paid[row, window * INTERVAL :][: tokens.shape[1] - after.start]
                for head, positions in enumerate(went[row]):
                    for position in positions[positions >= 0].tolist():
                        expected[head, position] = (weights * of_group[head, after, position]).sum()
            known = found[layer].shape[-1]
            torch.testing.assert_close(found[layer][row], expected[:, :known], rtol=1e-4, atol=1e-6)
            assert not expected[:, known:].any()


def test_a_replay_evicts_the_same_and_every_ratio_is_one() -> None:
    one = learner(seed=3, credit="trajectory")
    experience = one.collect(0)
    again = Evictions(one.episodes.layers, INTERVAL)

    def keep(state: Any, order: torch.Tensor, count: torch.Tensor) -> None:
        went = torch.arange(INTERVAL) < count[..., None]
        positions = state.positions.gather(-1, order[..., :INTERVAL])
        again.positions[state.layer].append(torch.where(went, positions, -1).int())

    replay = ReplayPolicy(experience.evictions, frozenset(), LENGTH)
    options = {"model": one.episodes.model, "budget": BUDGET, "interval": INTERVAL, "protection": PROTECTION}
    rollout(replay, experience.traces, on_eviction=keep, **options)  # type: ignore[arg-type]
    for layer, expected in zip(again.positions, experience.evictions.positions, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(layer, expected, strict=True))
    metrics = one.accumulate(experience, one.advantages(experience), kl_weight=1.0)
    assert metrics["loss/clip_fraction"] == 0
    assert metrics["loss/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["loss/policy"] == pytest.approx(0, abs=1e-6), "advantages of a group sum to 0 where ratios are 1"
    assert metrics["loss/entropy"] > 0


@pytest.mark.parametrize("reward", ["foresight", "lm_loss", "lm_loss_increase", "answer_loss"])
def test_rollouts_are_those_of_the_environment(reward: str) -> None:
    one = learner(reward=reward, temperature=0.2, seed=7)
    experience = one.collect(0)
    env = vector(len(experience.traces), reward=reward, autoreset_mode="Disabled", output="torch")
    ids = [int(trace.name.rsplit("/", 1)[1]) for trace in experience.traces]
    sampler = SamplingPolicy(one.policy, 0.2)
    env.track(sampler.needs - {"noise"})
    env.reset(seed=[7] * env.num_envs, options={"trace": ids, "rollout": list(range(env.num_envs))})
    for window in range(experience.reward.shape[1]):
        _, paid, *_ = env.step(policy_action(env, sampler))
        torch.testing.assert_close(paid, experience.reward[:, window], rtol=1e-9, atol=1e-9)


def test_a_rollout_does_not_depend_on_the_rows_beside_it() -> None:
    one = learner()
    experience, alone = one.collect(0), Evictions(one.episodes.layers, INTERVAL)
    sampler = SamplingPolicy(one.policy, 1.0, alone)
    options = {"model": one.episodes.model, "budget": BUDGET, "interval": INTERVAL, "protection": PROTECTION}
    rollout(sampler, experience.traces[4:5], rollouts=[4], on_eviction=sampler.record, **options)  # type: ignore[arg-type]
    for layer, expected in zip(alone.positions, experience.evictions.positions, strict=True):
        assert all(torch.equal(x[0], y[4]) for x, y in zip(layer, expected))


def plain_loss(of: GRPOLearner, experience: Experience, advantages: Advantages, kl_weight: float) -> torch.Tensor:
    """Return the loss with every feature in memory, pick by pick, by torch's own categorical distributions."""
    seen: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def keep(state: Any, order: torch.Tensor, count: torch.Tensor) -> None:
        features = of.features.compute(state)
        seen.append((state.layer, (features, state.mask.clone(), order.clone()), count.clone()))  # type: ignore[arg-type]

    replay = ReplayPolicy(experience.evictions, of.features.needs, LENGTH)
    options = {"model": of.episodes.model, "budget": BUDGET, "interval": INTERVAL, "protection": PROTECTION}
    rollout(replay, experience.traces, on_eviction=keep, **options)  # type: ignore[arg-type]
    rows: list[list[torch.Tensor]] = [[] for _ in experience.traces]
    windows = [0] * of.episodes.layers
    for layer, (features, mask, order), count in seen:  # type: ignore[misc]
        logits, fixed = (-scorer(features, layer) / of.config.temperature for scorer in (of.scorer, of.reference))
        for row, picks_of_row in enumerate(rows):
            for head in range(mask.shape[1]):
                picks = []
                left = mask[row, head].clone()
                credit = advantages(layer, windows[layer]).expand(len(rows), mask.shape[1], INTERVAL)[row, head]
                for pick, advantage in zip(order[row, head, : int(count[row, head])], credit.tolist()):
                    now, was = (
                        Categorical(logits=x[row, head].masked_fill(~left, -torch.inf)[left]) for x in (logits, fixed)
                    )
                    chosen = torch.tensor(int(left[:pick].sum()))
                    ratio = (now.log_prob(chosen) - was.log_prob(chosen).detach()).exp()
                    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                    picks.append(-gain + kl_weight * kl_divergence(now, was))
                    left = left & (torch.arange(len(left)) != pick)
                if picks:
                    picks_of_row.append(torch.stack(picks).mean())
        windows[layer] += 1
    return torch.stack([torch.stack(row).mean() for row in rows]).mean()


@pytest.mark.parametrize("credit", CREDITS)
def test_the_gradient_is_that_of_the_plain_loss(credit: str) -> None:
    one = learner(credit=credit, num_traces=1, temperature=0.5)
    experience = one.collect(0)
    advantages = one.advantages(experience)
    metrics = perturbed(one).accumulate(experience, advantages, kl_weight=0.7)
    found = gradients(one)
    assert metrics["loss/clip_fraction"] > 0.05, "without clipped picks the test tests less than it says"
    assert metrics["loss/kl"] > 0.01
    one.optimizer.zero_grad()
    loss = plain_loss(one, experience, advantages, 0.7)
    loss.backward()
    assert metrics["loss/policy"] + 0.7 * metrics["loss/kl"] == pytest.approx(float(loss.detach()), rel=1e-4)
    for mine, plain in zip(found, gradients(one), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-6)


def test_memory_does_not_grow_with_the_number_of_windows() -> None:
    peaks = []
    for length in (LENGTH, 2 * LENGTH):
        tokens = random_tokens(1, length)[0].numpy()
        one = learner(ListSource("list", "train", [Trace(tokens, 0, (), "list/0")]), num_traces=1)
        experience = one.collect(0)
        held = [0, 0]

        class Saved:
            """A tensor that autograd holds; counts while it lives."""

            def __init__(self, tensor: torch.Tensor, held: list[int] = held) -> None:
                self.tensor, self.held = tensor, held
                held[0] += tensor.nbytes
                held[1] = max(held)

            def __del__(self) -> None:
                self.held[0] -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            one.accumulate(experience, one.advantages(experience), 0.1)
        assert held[0] == 0, "something of the replay is kept"
        peaks.append(held[1])
    assert peaks[0] == peaks[1] > 0


@pytest.mark.parametrize("credit", ["trajectory", "attention"])
def test_traces_rolled_out_one_after_another_teach_the_same(credit: str) -> None:
    changes = {"num_traces": 3, "epochs": 2, "credit": credit, "reward": "lm_loss_increase"}
    whole, parted = learner(**changes), learner(**changes, at_once=2)
    assert [len(parted.collect(part).traces) for part in range(parted.parts)] == [2 * GROUP, GROUP]
    for _ in range(2):
        expected, found = whole.update(), parted.update()
        assert found.keys() == expected.keys()
        for tag in expected:
            if not tag.startswith("time/"):
                assert found[tag] == pytest.approx(expected[tag], rel=1e-4, abs=1e-6), tag
    for one, other in zip(whole.scorer.parameters(), parted.scorer.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_restored_is_never_stopped(tmp_path: Path) -> None:
    changes = {"budgets": (BUDGET - 4, BUDGET), "epochs": 2, "kl_updates": 3, "warmup": 3}
    whole, first, second = (learner(**changes) for _ in range(3))
    curve = [whole.update()["rollout/ep_rew_mean"] for _ in range(4)]
    for _ in range(2):
        first.update()
    save_checkpoint(tmp_path, first.state(), first.done)
    perturbed(second).restore(load_checkpoint(tmp_path))
    assert [second.update()["rollout/ep_rew_mean"] for _ in range(2)] == curve[2:]
    expected, found = whole.state(), second.state()
    assert found.values == expected.values
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)


def test_states_of_others_are_refused() -> None:
    state = learner().state()
    with pytest.raises(ValueError, match="learner 'ppo'"):
        learner().restore(State(state.tensors, state.values | {"learner": "ppo"}))
    with pytest.raises(ValueError, match="scorer doesn't fit"):
        learner(hidden=5).restore(state)


def test_it_learns_what_it_is_paid_for() -> None:
    source = ListSource("list", "train", [trace(0), trace(3)])
    one = learner(source, reward="lm_loss", group=12, learning_rate=3e-2, kl=0.0, credit="window", temperature=0.5)
    paid = [one.update()["rollout/ep_rew_mean"] for _ in range(30)]
    noise = np.std(np.diff(paid)) / 2**0.5 * (2 / 5) ** 0.5  # of the difference of two means of five
    assert np.mean(paid[-5:]) > np.mean(paid[:5]) + 3 * noise, paid


def test_the_divergence_from_the_start_is_held_down_as_long_as_it_is_weighted() -> None:
    free, held, released = (
        learner(learning_rate=3e-2, warmup=0, kl=kl, kl_updates=updates) for kl, updates in ((0, 9), (20, 9), (20, 1))
    )
    divergence = [[one.update()["loss/kl"] for _ in range(6)][-1] for one in (free, held, released)]
    assert divergence[1] < 0.5 * min(divergence[0], divergence[2])


def test_a_scorer_of_random_weights_is_calibrated_on_what_it_sees() -> None:
    one, inputs = learner(), []

    def keep(state: Any, order: torch.Tensor, count: torch.Tensor) -> None:
        features = one.features.compute(state)[:, 0][state.filled[:, 0]]
        squashed = torch.asinh((features - one.scorer.centre[0, 0]) / one.scorer.scale[0, 0])
        if state.layer == 0:
            inputs.append((squashed - one.scorer.mean[0, 0]) / one.scorer.deviation[0, 0])

    options = {"model": one.episodes.model, "budget": BUDGET, "interval": INTERVAL, "protection": PROTECTION}
    rollout(one.policy, [trace(i) for i in range(4)], on_eviction=keep, **options)  # type: ignore[arg-type]
    seen = torch.cat(inputs)
    assert (seen.mean(dim=0).abs() < 0.5).all()
    assert ((seen.std(dim=0) > 0.5) & (seen.std(dim=0) < 2)).all()


def test_it_goes_on_from_a_saved_policy(tmp_path: Path) -> None:
    start = learner().policy
    start.save_pretrained(tmp_path / "start")
    one = learner(init=str(tmp_path / "start"), hidden=9)
    assert torch.equal(one.scorer.last, start.scorer.last)
    one.update()
    assert not torch.equal(one.scorer.last, start.scorer.last)
    one.policy.save_pretrained(tmp_path / "policy")
    saved = agents.make(tmp_path / "policy")
    assert (saved.name, saved.features) == ("grpo", "stats")  # type: ignore[attr-defined]
    terms = (saved.model, saved.budgets, saved.interval)  # type: ignore[attr-defined]
    assert terms == (ModelIdentity.of(random_model()), (BUDGET,), INTERVAL)
    assert json.loads((tmp_path / "policy" / "policy.json").read_text())["training"]["group"] == GROUP


def test_rewards_of_answers_count_answers_only() -> None:
    one = learner(ListSource("list", "train", [trace(0), trace(3)]), reward="answer_loss")
    experience = one.collect(0)
    assert experience.reward.shape == (6, -(-(LENGTH - 1 - BUDGET - INTERVAL) // INTERVAL))
    # The answers are at 35, 36, 37 and 44, the windows' targets at 27-32, 33-38, 39-44, ...
    assert (experience.reward != 0).any(dim=0).tolist() == [False, True, True, False, False, False]
    assert "answer_loss" in REWARDS
    assert rollout_metrics(rollout_sums(experience.windows, experience.reward))["rollout/answer_loss"] == pytest.approx(
        float(-experience.reward.sum() * INTERVAL / (6 * 4)), rel=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 1}, "group 1 is impossible: it must be at least 2"),
        ({"temperature": 0.0}, r"temperature 0\.0 is impossible"),
        ({"credit": "layer"}, "unknown credit 'layer': known are trajectory, window, attention"),
        ({"reward": "fame"}, "unknown reward 'fame'"),
        ({"budgets": ()}, "budgets"),
        ({"budgets": (LENGTH,)}, f"budget {LENGTH}"),
        ({"init": "h2o"}, "init 'h2o' is not a learned policy"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(**changes).update()


def test_a_policy_of_another_model_is_refused(tmp_path: Path) -> None:
    ScorerPolicy(Scorer(1, 1, 12), "stats").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another architecture than this model's: layers 1, not 2; kv_heads 1, not 2"):
        learner(init=str(tmp_path))


def test_recording_needs_somewhere_to_write() -> None:
    one = learner()
    sampler = SamplingPolicy(one.policy, 1.0)
    options = {"model": one.episodes.model, "budget": BUDGET, "interval": INTERVAL, "protection": PROTECTION}
    with pytest.raises(ValueError, match="evictions="):
        rollout(sampler, [trace(0)], on_eviction=sampler.record, **options)  # type: ignore[arg-type]
