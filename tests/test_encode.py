"""What a policy encodes once of a pair must rank as what it would compute at every decision."""

from __future__ import annotations

import pytest
import torch

import agents
import kvenv
from agents.grpo import GRPOConfig, GRPOLearner
from agents.scorer import Scorer, ScorerPolicy
from kvenv.cache import SlotCache
from kvenv.features import feature_set
from kvenv.layerwise import rollout
from kvenv.rotary import Rotary
from kvenv.state import LayerState, Pairs
from tests.policies import Recorder, kvenv_model, random_traces
from tests.test_dispatch import Watch

SHAPE = {"budget": 20, "interval": 8}
HEAD_DIM, GROUPS = 16, 2
"""Of the small random model."""


class Forgetful:
    """A policy without its memory: it computes everything at every decision."""

    def __init__(self, policy) -> None:
        self.policy, self.name, self.needs = policy, policy.name, policy.needs

    def __call__(self, state: LayerState) -> torch.Tensor:
        """Return the policy's priorities."""
        assert state.encoded is None
        return self.policy(state)


def random_scorer(depth: int) -> ScorerPolicy:
    """Return a scorer of random weights and input constants for the small random model."""
    generator = torch.Generator().manual_seed(0)
    scorer = Scorer(2, 2, feature_set("pre-rope").width(HEAD_DIM, GROUPS), hidden=6, depth=depth, generator=generator)
    for constants in (scorer.centre, scorer.scale, scorer.mean, scorer.deviation):
        constants.uniform_(0.5, 2.0, generator=generator)
    return ScorerPolicy(scorer, "pre-rope")


@pytest.mark.parametrize("policy", [random_scorer(1), random_scorer(2), agents.make("keydiff"), agents.make("knorm")])
def test_what_is_remembered_ranks_as_what_is_computed_anew(policy) -> None:
    model, traces = kvenv_model(dtype=torch.float32), random_traces([90, 61, 33])
    recorders = [Recorder(model, traces) for _ in range(2)]
    for one, recorder in zip((policy, Forgetful(policy)), recorders):
        rollout(one, traces, model=model, on_eviction=recorder, **SHAPE)
    assert torch.equal(recorders[0].lost_at, recorders[1].lost_at)
    assert (recorders[0].lost_at < 10**6).any()


@pytest.mark.parametrize("name", ["imitation-tiny", "grpo-tiny", "kvp-tiny"])
def test_trained_policies_too(name: str, tiny_model) -> None:
    source = kvenv.load_traces("recall", split="validation", tokenizer=tiny_model.tokenizer, trace_length=256)
    policy, traces = agents.make(name), [source[i] for i in range(2)]
    losses = [
        rollout(one, traces, model=tiny_model.model, budget=48, interval=16).losses.nll
        for one in (policy, Forgetful(policy))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-4)


def test_every_pair_is_encoded_once_and_found_in_its_slot() -> None:
    model, traces = kvenv_model(), random_traces([70, 45])
    seen: list[int] = []

    class Watching:
        name, needs = "watching", frozenset({"noise"})

        def encode(self, pairs: Pairs) -> torch.Tensor:
            """Return where pairs are, and half of each key."""
            seen.append(pairs.positions.shape[-1])
            return torch.cat([pairs.positions[..., None].to(pairs.keys.dtype), pairs.keys[..., :4]], dim=-1)

        def __call__(self, state: LayerState) -> torch.Tensor:
            """Return noise, after a look at the slots."""
            expected = torch.cat([state.positions[..., None].to(state.keys.dtype), state.keys[..., :4]], dim=-1)
            assert torch.equal(state.encoded[state.filled], expected[state.filled])
            return state.noise

    rollout(Watching(), traces, model=model, **SHAPE)
    assert len(seen) == model.config.num_hidden_layers, "once for each layer"


def test_features_in_two_parts_are_those_in_one() -> None:
    model, traces = kvenv_model(dtype=torch.float32), random_traces([70, 45])
    seen, compared = feature_set("pre-rope"), 0

    class Comparing(Forgetful):
        def __call__(self, state: LayerState) -> torch.Tensor:
            """Return the policy's priorities, after a look at the features."""
            nonlocal compared
            columns = seen.split.columns(HEAD_DIM, GROUPS)
            others = [column for column in range(seen.width(HEAD_DIM, GROUPS)) if column not in columns]
            whole, filled = seen.compute(state), state.filled
            for part, where in ((seen.split.fixed(state), columns), (seen.split.changing(state), others)):
                torch.testing.assert_close(part[filled], whole[..., where][filled])
            compared += 1
            return super().__call__(state)

    rollout(Comparing(random_scorer(1)), traces, model=model, **SHAPE)
    assert compared


def test_what_is_encoded_follows_the_weights(tiny_model) -> None:
    source = kvenv.load_traces("recall", split="train", tokenizer=tiny_model.tokenizer, trace_length=128)
    config = GRPOConfig(updates=2, num_traces=1, group=2, budgets=(32,), learning_rate=0.1, warmup=0)
    learner, trace = GRPOLearner(tiny_model.model, source, config), [source[0]]
    for _ in range(2):
        policy = learner.policy
        losses = [
            rollout(one, trace, model=tiny_model.model, budget=32, interval=16).losses.nll
            for one in (policy, Forgetful(policy))
        ]
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-4)
        learner.update()


def test_a_policy_without_that_part_encodes_nothing() -> None:
    policy = ScorerPolicy(Scorer(2, 2, feature_set("stats").width(HEAD_DIM, GROUPS), hidden=4), "stats")
    assert policy.encode is None
    cache = SlotCache(kvenv_model(), rows=1, capacity=28, interval=8, budget=20, policy=policy)
    assert cache.layer_state(0).encoded is None
    with pytest.raises(ValueError, match="no part that never changes"):
        policy._encode(cache.layer_state(0))


@pytest.mark.parametrize("name", ["imitation-tiny", "kvp-tiny"])
def test_a_model_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"policy '{name}' was trained for another architecture .* layers 5, not 2"):
        rollout(agents.make(name), random_traces([90]), model=kvenv_model(dtype=torch.float32), **SHAPE)


def test_encoding_again_copies_nothing_to_the_device() -> None:
    policy, pairs = random_scorer(1), torch.zeros(1, 2, 3, HEAD_DIM)
    rotary = Rotary.of(kvenv_model(dtype=torch.float32))
    places = torch.zeros(1, 2, 3, dtype=torch.int64)
    for _ in range(2):
        with Watch() as watch:
            policy.encode(Pairs(layer=0, keys=pairs, values=pairs, positions=places, groups=GROUPS, rotary=rotary))
    assert watch.offences == []
