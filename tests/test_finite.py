"""NaN and infinity, wherever they come from, end a run with the trace named; nothing of them is written."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import agents
import kvenv
from agents.checkpoint import load_checkpoint
from agents.learner import Share, State
from agents.scorer import Scorer, ScorerPolicy
from experiments import cli, evaluate, generate, record, train
from kvenv.attention import use_kvenv_attention
from kvenv.evaluation import evaluate as rows_of
from kvenv.finite import check_finite, check_run
from kvenv.golden import future_attention
from kvenv.layerwise import rollout
from kvenv.registry import FEATURES, MODELS, REWARDS
from kvenv.state import LayerState
from kvenv.store import StoreWriter, TraceStore
from kvenv.traces import load_traces
from tests.environments import ARGUMENTS, single, vector
from tests.environments import trace as env_trace
from tests.models import random_model
from tests.policies import Random, kvenv_model, random_traces
from tests.test_dispatch import READ_BACK, Watch
from tests.test_train import OTHERS, assert_same_run

BAD_TOKEN = 2
"""No random trace has it."""

DECODING: dict[str, Any] = {"budget": 20, "interval": 8}


class NaNIn:
    """Ranks a (layer, row) by NaN; at a decision of the middle only."""

    name, needs = "nan-in", frozenset({"noise"})

    def __init__(self, layer: int, row: int) -> None:
        self.layer, self.row, self.calls = layer, row, 0

    def __call__(self, state: LayerState) -> Tensor:
        """Return the noise, once with a NaN in it."""
        priorities = state.noise.clone()
        self.calls += state.layer == self.layer
        if state.layer == self.layer and self.calls == 2:
            first = state.mask[self.row, 1].int().argmax()
            priorities[self.row, 1, first] = torch.nan
        return priorities


def broken_model(value: float) -> PreTrainedModel:
    """Return a model whose embedding of a token is NaN or infinite."""
    model = copy.deepcopy(random_model())
    use_kvenv_attention(model)
    model.get_input_embeddings().weight[BAD_TOKEN, 0] = value
    return model


def with_bad_token(traces: list, row: int) -> list:
    """Return traces of which one has the token."""
    tokens = traces[row].tokens.copy()
    tokens[30] = BAD_TOKEN
    return [replace(trace, tokens=tokens) if trace is traces[row] else trace for trace in traces]


@pytest.mark.parametrize(("layer", "row"), [(0, 0), (1, 2)])
def test_priorities_that_are_nan_name_trace_and_layer(layer: int, row: int) -> None:
    traces = random_traces([60, 55, 50])
    with pytest.raises(FloatingPointError) as told:
        rollout(NaNIn(layer, row), traces, model=kvenv_model(), **DECODING)
    assert str(told.value) == f"policy 'nan-in' ranks pairs by NaN on trace 'random/{row}', first in layer {layer}"


def test_nan_counts_among_candidates_of_rows_that_evict_only() -> None:
    class NaNElsewhere(Random):
        def __call__(self, state: LayerState) -> Tensor:
            return state.noise.where(state.mask, torch.nan)

    traces, model = random_traces([60, 31]), kvenv_model()
    got = rollout(NaNElsewhere(), traces, model=model, **DECODING)
    assert torch.equal(got.losses.nll, rollout(Random(), traces, model=model, **DECODING).losses.nll)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_name_the_trace(value: float) -> None:
    traces = with_bad_token(random_traces([60, 55, 50]), 1)
    with pytest.raises(FloatingPointError, match=r"the LLM's logits are NaN or infinite on trace 'random/1'"):
        rollout(Random(), traces, model=broken_model(value), **DECODING)


def test_features_that_are_infinite_stop_a_learned_policy() -> None:
    if "finite-test" not in FEATURES:
        kvenv.register_features("finite-test", _features_with_infinity, size=2)
    policy = ScorerPolicy(Scorer(2, 2, 2, 8, generator=torch.Generator().manual_seed(0)), "finite-test")
    with pytest.raises(FloatingPointError, match="policy 'scorer' ranks pairs by NaN on traces 'random/0', 'random/1'"):
        rollout(policy, random_traces([60, 55]), model=kvenv_model(), **DECODING)


def _features_with_infinity(state: LayerState) -> Tensor:
    return torch.stack([state.positions.float(), torch.full(state.positions.shape, torch.inf)], dim=-1)


def test_a_longer_rollout_asks_the_device_no_more_often() -> None:
    asked = []
    for length in (60, 180):
        with Watch() as watch:
            rollout(Random(), random_traces([length, length]), model=kvenv_model(), **DECODING)
        asked.append(sum(watch.count[name] for name in READ_BACK))
    assert asked[0] == asked[1]


@pytest.mark.parametrize("policy", [None, Random()])
def test_an_evaluation_names_the_trace(policy: Any) -> None:
    class Source:
        name, split, size, max_prompt_length = "broken", "test", 3, 0
        traces = with_bad_token(random_traces([60, 60, 60]), 2)

        def __getitem__(self, number: int) -> Any:
            return self.traces[number]

    source: Any = Source()
    with pytest.raises(FloatingPointError, match="the LLM's logits are NaN or infinite on trace 'random/2'"):
        list(rows_of({"one": policy}, source, range(3), model=broken_model(torch.nan), budgets=[20], interval=8))


def test_the_first_few_traces_are_named_each_once() -> None:
    flags = torch.tensor([True] * 6)
    with pytest.raises(FloatingPointError) as told:
        check_run("p", ["a", "a", "b", "c", "d", "e"], flags, None)
    assert str(told.value) == "the LLM's logits are NaN or infinite on traces 'a', 'b', 'c' and 2 more"
    check_run("p", ["a"], torch.tensor([False]), torch.zeros(2, 1, dtype=torch.bool))
    check_finite("numbers", np.zeros((2, 3)), lambda: pytest.fail("nothing is to be told"))
    with pytest.raises(FloatingPointError, match="numbers are NaN or infinite on trace 'b'"):
        check_finite("numbers", torch.tensor([[1.0, 2.0], [1.0, -torch.inf]]), lambda: ["a", "b"])


# The environment


@pytest.fixture
def flaky_reward() -> Iterator[list[float]]:
    """Register a reward that pays what the list says; 1 where it says nothing."""
    paid: list[float] = []

    def pay(losses: Any) -> Tensor:
        return losses.nll.new_full((len(losses.nll),), paid.pop(0) if paid else 1.0) + 0 * losses.nll.sum(dim=1)

    REWARDS._values["flaky"] = pay
    yield paid
    del REWARDS._values["flaky"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reward_that_is_no_number_is_refused(flaky_reward: list[float], value: float) -> None:
    flaky_reward += [1.0, value]
    env = single(reward="flaky")
    env.reset(seed=0, options={"trace": 4})
    env.step(env.action_space.sample())
    name = env_trace(4).name
    with pytest.raises(FloatingPointError, match=f"rewards 'flaky' are NaN or infinite on trace '{name}'"):
        env.step(env.action_space.sample())
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[1] == 1.0, "the environment is usable afterwards"


def test_tensors_are_left_to_the_learner(flaky_reward: list[float]) -> None:
    flaky_reward.append(np.nan)
    env = vector(output="torch", reward="flaky")
    env.reset(seed=0)
    assert env.step(torch.zeros(env.action_space.shape))[1].isnan().all()


def test_features_that_are_no_numbers_are_refused() -> None:
    if "finite-test" not in FEATURES:
        kvenv.register_features("finite-test", _features_with_infinity, size=2)
    env = vector(2, features="finite-test")
    with pytest.raises(FloatingPointError, match="features 'finite-test' are NaN or infinite on traces"):
        env.reset(seed=0)


def test_an_llm_that_gives_nan_shows_in_the_reward() -> None:
    if "finite-broken" not in MODELS:
        kvenv.register_model("finite-broken", broken_model(torch.nan))
    env = single(**(ARGUMENTS | {"model": "finite-broken"}))
    env.vector.dynamics.source.make = lambda number: with_bad_token([env_trace(0)], 0)[0]  # type: ignore[method-assign]
    env.reset(seed=0)
    with pytest.raises(FloatingPointError, match="are NaN or infinite on trace 'ragged/train/0'"):
        env.step(env.action_space.sample())


# What is written


def test_a_policy_of_nan_is_not_saved(tmp_path: Path) -> None:
    scorer = Scorer(2, 2, 12, 4)
    policy = ScorerPolicy(scorer, "stats")
    policy.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        scorer.last[1, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="policy 'scorer' isn't saved: its last hold NaN or infinity"):
        policy.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_state_of_nan_is_told_by_its_tensors() -> None:
    State({"weights": torch.ones(3), "steps": torch.tensor(3)}).check_finite()
    with pytest.raises(FloatingPointError, match="the learner's a, b, c and 1 more hold NaN or infinity"):
        State({name: torch.tensor([1.0, torch.inf]) for name in "abcd"}).check_finite()


def test_a_store_takes_no_number_that_its_dtype_does_not_hold(tmp_path: Path) -> None:
    record.main(["--out", str(tmp_path), "--traces", "recall", "--num-traces", "2", "--trace-length", "96", "--half"])
    writer = StoreWriter(tmp_path, TraceStore(tmp_path).recording)
    trace = TraceStore(tmp_path)[0]
    keys = trace.keys.float().clone()
    keys[0, 0, 0, 0] = 1e5
    with pytest.raises(FloatingPointError, match=r"keys in float16 are NaN or infinite on trace 'recall/train/0'"):
        writer.add([replace(trace, keys=keys)])
    assert len(TraceStore(tmp_path)) == 2


SMALL = ["--trace-length", "128", "--hidden", "4", "--updates", "4", "--save-every", "2", "--eval-every", "0"]
OPTIONS = OTHERS | {"imitation": ["--num-traces", "2", "--budgets", "32"]}


@pytest.mark.parametrize(
    "name", ["kvp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("imitation", "grpo", "ppo"))]
)
def test_a_gradient_of_nan_ends_a_training_whose_checkpoint_is_intact(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [name, *OPTIONS[name], *SMALL]
    if name == "kvp":
        store = tmp_path / "store"
        record.main(["--out", str(store), "--traces", "recall", "--num-traces", "3", "--trace-length", "128"])
        options += ["--store", str(store)]
    straight, out = tmp_path / "straight", tmp_path / "broken"
    train.main([*options, "--out", str(straight)])
    kind: Any = type(train.parse(options).build())
    original = kind.update

    def poisoned(self: Any) -> dict[str, float]:
        if self.done == 3 and name == "kvp":
            # Its gradients never pass the weights themselves.
            monkeypatch.setattr(self, "share", lambda *part: _lost(kind.share(self, *part)))
        elif self.done == 3:
            for layer in range(5):
                _first_weight(self, layer).register_hook(lambda gradient: gradient * torch.nan)
        metrics: dict[str, float] = original(self)
        return metrics

    monkeypatch.setattr(kind, "update", poisoned)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.run(train.main, [*options, "--out", str(out)])
    assert stopped.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert "update 4 gives NaN or infinity in " in line
    assert "loss/grad_norm" in line
    assert "/train/" in line, "the traces of the batch are named"
    assert line.endswith(f"--resume {out} goes on from update 2")
    load_checkpoint(out / "checkpoints").check_finite()
    policy: Any = agents.make(out / "policy")
    assert policy.training["updates_done"] == 2
    monkeypatch.undo()
    train.main(["--resume", str(out)])
    assert_same_run(out, straight)


def _lost(share: Share) -> Share:
    """Return a share of gradients that are no numbers."""
    return replace(share, gradients=[gradient * torch.nan for gradient in share.gradients])


def _first_weight(learner: Any, layer: int) -> Tensor:
    """Return a weight of what is trained; imitation has parts of its own for every layer."""
    scorer = learner.model.policy if hasattr(learner, "model") else getattr(learner, "scorer", None)
    trained = learner.students[0].layers[layer] if scorer is None else scorer
    return next(iter(trained.parameters()))


def test_weights_that_overflow_in_the_last_step_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["imitation", *OPTIONS["imitation"], *SMALL, "--out", str(tmp_path / "run")]
    kind: Any = type(train.parse(options).build())
    original = kind.update

    def overflows(self: Any) -> dict[str, float]:
        metrics: dict[str, float] = original(self)
        if self.done == 4:
            self.students[0].mean.last.data[0, 0, 0] = torch.inf
        return metrics

    monkeypatch.setattr(kind, "update", overflows)
    with pytest.raises(
        FloatingPointError, match=r"learner's mean\.last hold NaN or infinity; --resume .* from update 2"
    ):
        train.main(options)
    assert load_checkpoint(tmp_path / "run" / "checkpoints").values["done"] == 2
    assert agents.make(tmp_path / "run" / "policy").training["updates_done"] == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_reward_of_nan_ends_a_training_with_its_traces(
    name: str, tmp_path: Path, flaky_reward: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    flaky_reward.append(np.nan)
    options = [name, *OPTIONS[name], *SMALL, "--reward", "flaky", "--traces", "recall"]
    with pytest.raises(SystemExit) as stopped:
        cli.run(train.main, [*options, "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert "rewards 'flaky' are NaN or infinite on traces 'recall/train/" in capsys.readouterr().err


# Commands


@pytest.fixture
def nan_policy(monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the policy keydiff rank by NaN, and return its name."""
    kind: Any = type(agents.make("keydiff"))
    monkeypatch.setattr(kind, "__call__", lambda self, state: torch.full(state.positions.shape, torch.nan))
    return "keydiff"


def test_rows_of_nan_are_not_written_and_those_before_are(
    tmp_path: Path, nan_policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--budgets", "32", "--num-traces", "2", "--trace-length", "128", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        cli.run(evaluate.main, ["--policies", "random", nan_policy, *options])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "policy 'keydiff' ranks pairs by NaN on traces 'recall/test/0', 'recall/test/1', first in layer 0" in said
    assert not (tmp_path / "out" / "results.json").exists()


def test_generated_answers_are_looked_at(tmp_path: Path, nan_policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(generate.main, ["the " * 40, "--policy", nan_policy, "--budget", "24", "--interval", "8"])
    assert stopped.value.code == 2
    assert "policy 'keydiff' ranks pairs by NaN on trace 'the prompt', first in layer 0" in capsys.readouterr().err
    options = ["--tasks", "ruler/recall", "--budgets", "32", "--num-traces", "1", "--trace-length", "256"]
    with pytest.raises(FloatingPointError, match="policy 'keydiff' ranks pairs by NaN on trace"):
        evaluate.main(["--policies", nan_policy, *options, "--out", str(tmp_path)])


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_an_llm_of_nan_generates_nothing_that_counts(temperature: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "finite-tiny" not in MODELS:
        loaded = kvenv.load_model("tiny")
        model = copy.deepcopy(loaded.model)
        model.get_output_embeddings().weight.data[0] = torch.nan
        kvenv.register_model("finite-tiny", model, loaded.tokenizer)
    argv = "the --model finite-tiny --max-new-tokens 8 --budget 24 --interval 8 --temperature"
    with pytest.raises(SystemExit) as stopped:
        cli.run(generate.main, [*argv.split(), temperature])
    assert stopped.value.code == 2
    assert "the LLM's logits are NaN or infinite on trace 'the prompt'" in capsys.readouterr().err


def test_golden_is_told_by_its_full_cache_pass() -> None:
    loaded = kvenv.load_model("tiny")
    source = load_traces("recall", tokenizer=loaded.tokenizer, trace_length=128)
    model = copy.deepcopy(loaded.model)
    model.model.layers[2].self_attn.k_proj.weight.data[0, 0] = torch.nan  # type: ignore[union-attr]
    tokens = [source[0].tokens]
    future = future_attention(model, tokens, interval=16, anchors=48)[0]
    golden = agents.make("golden")
    with pytest.raises(FloatingPointError, match=r"logits are NaN .*; policy 'golden' ranks .* first in layer 2"):
        rollout(golden, [source[0]], model=model, budget=32, interval=16, future=future)
