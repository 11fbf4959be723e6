"""KVP: its gradient against the closed form, its reward against KVRank-v0, resuming, and what its scorer must see."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import agents
from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.kvp import PRESETS, Cuts, KVPConfig, KVPLearner, leave_one_out, returns
from agents.kvp_scorer import KVPPolicy, KVPScorer
from agents.learner import State
from kvenv import plackett_luce
from kvenv.features import PLACES, places
from kvenv.layerwise import rollout
from kvenv.models import LoadedModel
from kvenv.rank_env import KVRankEnv, least_cost
from kvenv.ranking import action_from_order
from kvenv.recording import RecordedTrace, Recording, record
from kvenv.rotary import Rotary
from kvenv.store import StoreWriter, TraceStore
from tests.environments import BUDGET, INTERVAL, PROTECTION, trace
from tests.policies import kvenv_model, random_traces

LENGTHS = (30, 40, 23)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a small store."""
    directory, model = tmp_path_factory.mktemp("store"), kvenv_model()
    made = Recording.of(LoadedModel("random", model, None), traces="x", split="train", trace_length=40, interval=6)
    StoreWriter(directory, made).add(record(model, random_traces(list(LENGTHS)), 6))
    return directory


def learner(store: Path | list[RecordedTrace], **changes: object) -> KVPLearner:
    """Return a small learner."""
    options = {"batch_size": 4, "samples": 4, "updates": 40, "embedding": 8, "hidden": 12, "warmup": 4}
    traces = TraceStore(store) if isinstance(store, Path) else store
    return KVPLearner(traces, KVPConfig(**{**options, **changes}))  # type: ignore[arg-type]


def expected_cost(scores: Tensor, utility: Tensor) -> Tensor:
    """Return the expected cost of a Plackett-Luce ranking in closed form: j precedes i with odds exp(f_j - f_i)."""
    before = torch.sigmoid(scores[None, :] - scores[:, None])
    return (utility * (1 + before.sum(dim=1) - before.diagonal())).sum()


def log_prob(scores: Tensor, order: Tensor) -> Tensor:
    """Return the log-probability of each pick of rankings (..., n), best first."""
    mask = torch.ones_like(order, dtype=torch.bool)
    count = torch.full(order.shape[:-1], order.shape[-1])
    return plackett_luce.log_prob(scores.expand(order.shape), order, mask, count, order.shape[-1])


def test_the_closed_form_is_the_mean_over_all_rankings() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, utility = torch.randn(5, generator=generator).double(), torch.rand(5, generator=generator).double()
    orders = torch.tensor(list(permutations(range(5))))
    probability = log_prob(scores, orders).sum(dim=-1).exp()
    assert float(probability.sum()) == pytest.approx(1)
    costs = (utility[orders] * torch.arange(1, 6)).sum(dim=-1)
    assert float((probability * costs).sum()) == pytest.approx(float(expected_cost(scores, utility)))


@pytest.mark.parametrize("credit", ["ranking", "budget"])
@pytest.mark.parametrize("group", ["trace", "batch"])
def test_the_estimated_gradient_is_that_of_the_expected_reward(credit: str, group: str) -> None:
    # 4,000 groups of K = 4 rankings of a trace, or of one ranking of each of 4 copies of it.
    generator = torch.Generator().manual_seed(1)
    groups, together, items = 4000, 4, 6
    scores = torch.randn(items, generator=generator).double().requires_grad_()
    utility = torch.rand(items, generator=generator).double() ** 3
    least = least_cost(utility)
    (exact,) = torch.autograd.grad(-expected_cost(scores, utility) / least, scores)
    shape = (together, groups, 1, 1, items) if group == "trace" else (1, groups, 1, together, items)
    uniform = torch.rand(shape, generator=generator).double()
    order = plackett_luce.priorities(scores.detach(), uniform).argsort(dim=-1)
    paid = returns(utility.expand(shape).gather(-1, order), least.expand(shape[:-1]), credit)
    logs = log_prob(scores, order)
    single = (leave_one_out(paid, group) * logs).sum(dim=-1).mean(dim=(0, 3))[:, 0]
    # Jackknife over the groups: the gradients of their mean, and its standard error, from batches of 100.
    parts = torch.stack(
        [torch.autograd.grad(part.mean(), scores, retain_graph=True)[0] for part in single.split(groups // 40)]
    )
    error = parts.std(dim=0) / len(parts) ** 0.5
    assert ((parts.mean(dim=0) - exact).abs() < 4 * error).all()
    assert (error < 0.3 * exact.abs().max()).all(), "too noisy to tell"


def test_paying_picks_for_what_they_decide_is_less_noisy() -> None:
    generator = torch.Generator().manual_seed(1)
    scores, utility = torch.zeros(30, dtype=torch.double, requires_grad=True), torch.rand(30, generator=generator) ** 3
    shape = (8, 50, 1, 1, 30)
    order = torch.rand(shape, generator=generator).argsort(dim=-1)
    spread = {}
    for credit in ("ranking", "budget"):
        paid = returns(utility.double().expand(shape).gather(-1, order), least_cost(utility.double()), credit)
        single = (leave_one_out(paid, "trace") * log_prob(scores, order)).sum(dim=-1).mean(dim=0)[:, 0, 0]
        parts = torch.stack([torch.autograd.grad(part, scores, retain_graph=True)[0] for part in single])
        spread[credit] = float(parts.std(dim=0).mean())
    assert spread["budget"] < 0.8 * spread["ranking"]


@pytest.mark.parametrize("group", ["trace", "batch"])
def test_leave_one_out_is_the_formula(group: str) -> None:
    paid = torch.rand(3, 2, 2, 4, 1, generator=torch.Generator().manual_seed(0)).double()
    actual = leave_one_out(paid, group)
    for k, layer, head, row in np.ndindex(3, 2, 2, 4):
        others = [
            float(paid[i, layer, head, j, 0])
            for i, j in np.ndindex(3, 4)
            if (i, j) != (k, row) and (group == "batch" or j == row)
        ]
        assert float(actual[k, layer, head, row, 0]) == pytest.approx(
            float(paid[k, layer, head, row, 0]) - np.mean(others)
        )


def scored(agent: KVPLearner, batch: Cuts) -> torch.Tensor:
    """Return the scores (1, H, N, C) of a batch in its layer."""
    with torch.no_grad():
        pairs = (batch.keys[:, 0], batch.values[:, 0], batch.positions, batch.ages)
        return agent.scorer(*pairs, batch.layer)[..., batch.slots]


def test_the_reward_is_that_of_the_environment(store: Path) -> None:
    agent, env = learner(store, power=1.0), KVRankEnv(store=str(store))
    batches = [agent.batch(1, layer) for layer in range(agent.parts)]
    order = torch.cat([agent.rank(scored(agent, batch), batch) for batch in batches], dim=1)
    utility = torch.cat([batch.utility for batch in batches])
    paid = returns(utility.expand(order.shape).gather(-1, order), least_cost(utility), "ranking")
    for row, (number, cut) in enumerate(batches[0].chosen):
        for sample in range(4):
            observation, _ = env.reset(options={"trace": number, "cut": cut})
            mask = torch.from_numpy(observation["mask"]).bool()
            slots = torch.arange(mask.shape[-1]).expand(mask.shape).clone()
            slots[..., :cut] = order[sample, :, :, row, :cut].flip(-1)
            head_reward = env.step(action_from_order(slots, mask).numpy())[4]["head_reward"]
            np.testing.assert_allclose(paid[sample, :, :, row, 0].numpy(), head_reward, rtol=1e-5)


def test_layers_and_heads_have_noise_of_their_own(store: Path) -> None:
    agent = learner(store)
    batches = [agent.batch(1, layer) for layer in range(2)]
    flat = torch.zeros_like(batches[0].utility)
    ranked = [agent.rank(flat, batch) for batch in batches]
    assert not torch.equal(*ranked)
    assert not torch.equal(ranked[0][:, :, 0], ranked[0][:, :, 1])


def test_a_batch_is_scored_as_the_policy_scores_each_trace(store: Path) -> None:
    agent = learner(store)
    for layer in range(agent.parts):
        batch = agent.batch(1, layer)
        scores = scored(agent, batch)
        assert len({cut for _, cut in batch.chosen}) == 4
        for row, (number, cut) in enumerate(batch.chosen):
            recorded = agent.store[number]
            positions = torch.arange(cut)
            assert batch.mask[row].sum() == cut
            utility = recorded.utility_at(cut)[layer] ** agent.config.power
            torch.testing.assert_close(batch.utility[0, :, row, :cut], utility)
            pairs = (x[layer, None, :, :cut] for x in (recorded.keys, recorded.values))
            alone = agent.scorer(*pairs, positions, cut - positions, layer)[0]
            torch.testing.assert_close(scores[0, :, row, :cut], alone)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"credit": "ranking"},
        {"group": "batch", "credit": "ranking", "samples": 1},
        *({"objective": name} for name in ("cost", "regression", "pairwise", "soft-rank")),
    ],
)
def test_kvp_learns_to_rank(store: Path, options: dict[str, object]) -> None:
    agent = learner(store, updates=80, batch_size=8, learning_rate=5e-3, **options)
    rewards = [agent.update()["rollout/ep_rew_mean"] for _ in range(80)]
    assert np.mean(rewards[-15:]) > np.mean(rewards[:15]) + 0.05
    # The best ranking gets -1.
    assert max(rewards) <= -1


def test_agents_learn_independently(store: Path) -> None:
    traces = list(TraceStore(store))
    others = []
    for recorded in traces:
        utility = recorded.utility.clone()
        utility[0, 0] = utility[0, 0].flip(-1)
        others.append(replace(recorded, utility=utility))
    one, other = learner(traces), learner(others)
    for _ in range(5):
        one.update()
        other.update()
    for (name, mine), theirs in zip(one.scorer.named_parameters(), other.scorer.parameters(), strict=True):
        assert torch.equal(mine[1], theirs[1]), name
        assert torch.equal(mine[0, 1], theirs[0, 1]), name
        assert not torch.equal(mine[0, 0], theirs[0, 0]), name


def test_a_restored_learner_never_stopped(store: Path, tmp_path: Path) -> None:
    straight, stopped = learner(store), learner(store)
    for _ in range(3):
        straight.update()
        stopped.update()
    save_checkpoint(tmp_path, stopped.state(), stopped.done)
    resumed = learner(store)
    resumed.restore(load_checkpoint(tmp_path))
    for _ in range(3):
        expected, actual = straight.update(), resumed.update()
        assert {k: v for k, v in expected.items() if "time" not in k} == {
            k: v for k, v in actual.items() if "time" not in k
        }
    assert resumed.done == straight.done == 6
    first, second = straight.state(), resumed.state()
    assert first.values == second.values
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name


def test_a_store_that_grew_is_refused(store: Path) -> None:
    state = learner(store).state()
    state.values["store"] += 1
    with pytest.raises(ValueError, match="the store has 3 traces, the run learnt from 4"):
        learner(store).restore(state)


def test_a_state_is_a_copy_and_foreign_ones_are_refused(store: Path) -> None:
    agent = learner(store)
    agent.update()
    state = agent.state()
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    agent.update()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors.items())
    with pytest.raises(ValueError, match="is of learner 'grpo'"):
        agent.restore(State(state.tensors, {"learner": "grpo", "done": 1}))
    with pytest.raises(ValueError, match="doesn't fit"):
        learner(store, hidden=5).restore(state)


def test_the_policy_is_the_running_mean(store: Path, tmp_path: Path) -> None:
    agent = learner(store)
    for _ in range(6):
        agent.update()
    assert not torch.equal(agent.policy.scorer.last.weight, agent.scorer.last.weight)
    agent.policy.save_pretrained(tmp_path / "policy")
    loaded = agents.make(tmp_path / "policy")
    assert loaded.name == "kvp"
    assert loaded.needs == frozenset()
    assert loaded.training == {"learner": "kvp", "updates_done": 6, **asdict(agent.config)}
    assert (loaded.model, loaded.budgets, loaded.interval) == (TraceStore(store).identity, None, 6)
    assert learner(list(TraceStore(store))).policy.model.fingerprint is None
    options = {"model": kvenv_model(), "budget": BUDGET, "interval": INTERVAL, "protection": PROTECTION}
    losses = [rollout(policy, [trace(0)], **options).losses.nll for policy in (agent.policy, loaded)]  # type: ignore[arg-type]
    assert torch.equal(*losses)


def test_damaged_policies_are_refused(store: Path, tmp_path: Path) -> None:
    directory = tmp_path / "policy"
    learner(store).policy.save_pretrained(directory)
    whole = (directory / "policy.safetensors").read_bytes()
    (directory / "policy.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"policy\.safetensors doesn't hold"):
        agents.make(directory)
    (directory / "policy.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        agents.make(directory)
    description = json.loads((directory / "policy.json").read_text())
    for change in ({"shape": [2, 2]}, {"shape": None}, {"inv_freq": "x"}):
        (directory / "policy.json").write_text(json.dumps(description | change))
        with pytest.raises(ValueError, match="is not a kvp policy's description"):
            agents.make(directory)


def test_a_policy_of_another_shape_says_so() -> None:
    policy = KVPPolicy(KVPScorer(2, 2, 8, 4, 4, [1.0]))
    with pytest.raises(ValueError, match="head_dim 8, not 16; inv_freq of 1 frequencies, not 8"):
        rollout(policy, [trace(0)], model=kvenv_model(), budget=BUDGET, interval=INTERVAL, protection=PROTECTION)


def scorer() -> KVPScorer:
    """Return a scorer with random weights and one rotary frequency."""
    return KVPScorer(2, 2, 6, 8, 12, [0.3], torch.Generator().manual_seed(0))


def test_norms_are_seen() -> None:
    keys, values = torch.randn(2, 1, 2, 2, 9, 6, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9)
    network = scorer()
    plain = network(keys, values, positions, 9 - positions)
    for scaled in ((2 * keys, values), (keys, 2 * values)):
        assert (network(*scaled, positions, 9 - positions) - plain).abs().min() > 1e-3


def test_a_key_says_the_same_wherever_it_stands() -> None:
    network, generator = scorer(), torch.Generator().manual_seed(0)
    # Blind to the place itself: that is an input of its own.
    with torch.no_grad():
        network.first.weight[..., -PLACES:, :] = 0
    key, value = torch.randn(2, 1, 2, 2, 1, 6, generator=generator).expand(-1, -1, -1, -1, 3, -1)
    positions = torch.tensor([0, 300, 4000])
    turned = Rotary(network.inv_freq).rotate(key, positions)
    assert not torch.allclose(turned[..., 1, :], turned[..., 2, :], atol=0.1)
    scores = network(turned, value, positions, positions)
    torch.testing.assert_close(scores, scores[..., :1].expand_as(scores), rtol=1e-3, atol=1e-3)


def test_positions_beyond_training_are_close_to_those_within() -> None:
    length = torch.tensor([255, 256, 1023, 1024, 100_000])
    within, beyond = places(length, length), places(length + 1, length + 1)
    assert (within - beyond).abs().max() < 0.05
    assert places(torch.tensor([10**6]), torch.tensor([10**6])).abs().max() < 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "rank"}, "unknown objective 'rank': known are reinforce, cost, regression, pairwise, soft-rank"),
        ({"group": "head"}, "unknown group 'head': known are trace, batch"),
        ({"credit": "pick"}, "unknown credit 'pick'"),
        ({"samples": 1}, "nothing to be compared with"),
        ({"group": "batch", "credit": "ranking", "samples": 1, "batch_size": 1}, "nothing to be compared with"),
        ({"group": "batch", "credit": "budget"}, "choose group 'trace'"),
        ({"hidden": 0}, "hidden 0 is impossible: it must be at least 1"),
        ({"embedding": -1}, "embedding -1 is impossible"),
        ({"power": 0.0}, r"power 0\.0 is impossible: it must be positive"),
        ({"ema": 1.0}, r"ema 1\.0 is impossible"),
    ],
)
def test_impossible_hyper_parameters_are_refused(store: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(store, **changes)


def test_an_empty_store_is_refused_and_the_preset_is_the_papers(store: Path) -> None:
    with pytest.raises(ValueError, match="has no traces"):
        learner([])
    preset = PRESETS["kvp"]
    assert (preset.learning_rate, preset.samples, preset.group, preset.credit) == (5e-5, 1, "batch", "ranking")
    assert KVPLearner(TraceStore(store), replace(preset, batch_size=2)).scorer.shape == (2, 2, 16, 256, 256)
