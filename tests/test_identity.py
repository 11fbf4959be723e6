"""Which LLM a policy was trained for: told apart by what matters, refused before anything runs, and cheap to ask."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

import agents
import kvenv
from agents.ranking_policy import SamplingPolicy
from agents.scorer import Scorer, ScorerPolicy
from kvenv import identity
from kvenv.attention import use_kvenv_attention
from kvenv.evaluation import evaluate
from kvenv.expert import policy_action
from kvenv.features import feature_set
from kvenv.identity import Architecture, ModelIdentity, architecture, check_policy, fingerprint
from kvenv.layerwise import rollout
from kvenv.models import LoadedModel, load_model
from kvenv.recording import Recording, record
from kvenv.store import StoreWriter, TraceStore
from kvenv.traces.user import ListSource
from tests.environments import ARGUMENTS, BUDGET, INTERVAL, MODEL, PROTECTION, single, trace, vector
from tests.models import ARCHITECTURES, random_model
from tests.policies import kvenv_model, random_traces

SIZES = st.none() | st.integers(1, 9)
SHAPES = st.builds(
    Architecture,
    model_type=st.none() | st.sampled_from(["llama", "qwen3"]),
    layers=SIZES,
    kv_heads=SIZES,
    groups=SIZES,
    head_dim=SIZES,
    inv_freq=st.none() | st.lists(st.floats(1e-6, 1), min_size=1, max_size=3).map(tuple),
    rotary_scaling=st.none() | st.floats(0.5, 2),
)


def policy_for(model: PreTrainedModel, **changes: Any) -> ScorerPolicy:
    """Return a policy of random weights that says it was trained for a model of the small random one's shape."""
    scorer = Scorer(2, 2, feature_set("stats").width(16, 2), hidden=4, generator=torch.Generator().manual_seed(0))
    return ScorerPolicy(scorer, "stats", "mine", model=replace(ModelIdentity.of(model), **changes))


@given(one=SHAPES, other=SHAPES)
def test_architectures_differ_both_ways_or_not_at_all(one: Architecture, other: Architecture) -> None:
    assert bool(one.difference(other)) == bool(other.difference(one))
    assert not one.difference(one)
    assert not one.difference(Architecture())
    known = ModelIdentity("a", None, one)
    assert ModelIdentity.from_json(json.loads(json.dumps(asdict(known)))) == known


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_that_of_its_cache(name: str) -> None:
    model = kvenv_model(name)
    found = architecture(model)
    cache = kvenv.EvictingCache(model, agents.make("h2o"), budget=8, interval=2)
    model.generate(torch.tensor([[1, 5, 6]]), past_key_values=cache, max_new_tokens=2, pad_token_id=0)
    keys, queries = cache._slots.keys, cache._slots.queries
    assert (found.model_type, found.layers) == (name, len(keys))
    assert (found.kv_heads, found.head_dim) == (keys[0].shape[1], keys[0].shape[-1])
    assert found.groups == queries[0].shape[2]
    assert len(found.inv_freq) == found.head_dim // 2


def changed(model: PreTrainedModel, **config: Any) -> PreTrainedModel:
    """Return a model of another configuration with weights of its own, on kvenv's attention."""
    made = type(model)(type(model.config)(**{**model.config.to_dict(), **config})).eval().requires_grad_(False)
    use_kvenv_attention(made)
    return made


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_hidden_layers": 3, "layer_types": None}, "layers 2, not 3"),
        ({"num_key_value_heads": 1}, "kv_heads 2, not 1; groups 2, not 4"),
        ({"num_attention_heads": 8}, "groups 2, not 4"),
        ({"head_dim": 8}, "head_dim 16, not 8; inv_freq of 8 frequencies, not 4"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, r"inv_freq\[1\] 0\.31\d*, not 0\.19\d*"),
    ],
)
def test_a_model_of_another_architecture_is_refused_with_the_reason(config: dict[str, Any], says: str) -> None:
    policy, other = policy_for(random_model()), changed(random_model(), **config)
    with pytest.raises(ValueError, match=rf"policy 'mine' was trained for another architecture .*: {says}$"):
        policy.check_model(other)


def test_so_is_one_of_another_family_of_the_same_shape() -> None:
    with pytest.raises(ValueError, match=r"model_type llama, not qwen2$"):
        ModelIdentity.of(random_model("llama")).check(random_model("qwen2"), "x")


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="policy 'a' takes 5 numbers of a pair: features 'kv' of this model are 33"):
        ScorerPolicy(Scorer(2, 2, 5), "kv", "a").check_model(random_model())


@pytest.mark.parametrize("where", ["rollout", "generate", "evaluate", "env", "vector", "sampled"])
def test_it_is_refused_everywhere_before_anything_runs(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy: Any = policy_for(random_model("qwen3", layers=3), architecture=Architecture(layers=2, head_dim=8))
    model, terms = load_model(MODEL).model, {"budget": BUDGET, "interval": INTERVAL, "protection": PROTECTION}
    env, vectors = single(), vector()
    env.reset(seed=0), vectors.reset(seed=0)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(model.model), "forward", never)
    source = ListSource("list", "test", [trace(0)])
    calls: dict[str, Callable[[], Any]] = {
        "rollout": lambda: rollout(policy, [trace(0)], model=model, **terms),
        "sampled": lambda: rollout(SamplingPolicy(policy, 1.0), [trace(0)], model=model, **terms),
        "generate": lambda: kvenv.EvictingCache(model, policy, **terms),
        "evaluate": lambda: next(
            evaluate({"a": policy}, source, [0], model=model, budgets=[BUDGET], interval=INTERVAL)
        ),
        "env": lambda: policy_action(env, policy),
        "vector": lambda: policy_action(vectors, policy),
    }
    with pytest.raises(ValueError, match="another architecture than this model's: head_dim 8, not 16"):
        calls[where]()


def test_other_weights_are_warned_of_once() -> None:
    policy, other = policy_for(random_model()), random_model(seed=1)
    mine, theirs = fingerprint(random_model())[:12], fingerprint(other)[:12]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            policy.check_model(other)
        policy.check_model(random_model())
    (warning,) = caught
    assert "policy 'mine'" in str(warning.message)
    assert f"fingerprint {mine}..., this one has {theirs}..." in str(warning.message)
    policy_for(random_model(), fingerprint=None).check_model(other)  # nobody knows: nothing to warn of


def test_a_fingerprint_is_of_the_weights_and_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = copy.deepcopy(random_model()), []
    sha256 = identity.hashlib.sha256
    monkeypatch.setattr(identity.hashlib, "sha256", lambda *data: made.append(1) or sha256(*data))
    for _ in range(3):
        assert fingerprint(model) == fingerprint(random_model())
    assert len(made) <= 2  # one of each, if no other test asked before
    other = copy.deepcopy(model)
    other.config.update({"use_cache": False})  # versions of transformers add entries: none but the type counts
    assert fingerprint(other) == fingerprint(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(other) != fingerprint(model)
    assert fingerprint(copy.deepcopy(model).float()) != fingerprint(model)


def test_policies_without_an_opinion_serve_every_model() -> None:
    check_policy(agents.make("h2o"), random_model())
    check_policy(None, random_model())


def test_a_store_knows_its_model(tmp_path: Any) -> None:
    model = kvenv_model()
    loaded = LoadedModel("random", model, None)
    recording = Recording.of(loaded, traces="x", split="train", trace_length=40, interval=6)
    StoreWriter(tmp_path, recording).add(record(model, random_traces([30]), 6))
    without, beside = TraceStore(tmp_path).identity, TraceStore(tmp_path, model).identity
    assert (without.name, without.fingerprint) == (beside.name, beside.fingerprint) == ("random", fingerprint(model))
    assert beside.architecture == architecture(model)
    assert without.architecture == replace(beside.architecture, model_type=None, groups=None)
    with pytest.raises(ValueError, match=r"recorded from another model than this one, 'random' with layers 2, not 3"):
        TraceStore(tmp_path, random_model(layers=3))


def test_models_are_known_by_the_name_they_were_asked_for() -> None:
    assert ModelIdentity.of(load_model("tiny").model).name == "tiny"
    assert ModelIdentity.of(load_model(ARGUMENTS["model"]).model).name == MODEL
    assert ModelIdentity.of(random_model("phi3")).name is None
