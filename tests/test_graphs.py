"""Captured steps equal the others bit for bit: on the CPU with a stand-in for CUDA graphs, see tests/replay.py."""

from __future__ import annotations

import copy
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import kvenv
from kvenv import dynamics, graphs
from kvenv.attention import use_kvenv_attention
from kvenv.cache import SlotCache
from kvenv.dynamics import Dynamics
from kvenv.features import feature_set
from kvenv.graphs import WARM_UP_CALLS, Graphs
from kvenv.limits import Limits
from kvenv.models import LoadedModel
from kvenv.registry import FEATURES
from kvenv.state import LayerState
from kvenv.traces import load_traces
from kvenv.vector_env import KVEvictVectorEnv
from tests.environments import BUDGET, INTERVAL, LENGTH, PROTECTION, RAGGED, vector
from tests.replay import GONE, Replay
from tests.test_dispatch import Watch


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture on the CPU."""
    monkeypatch.setattr(graphs, "backend", Replay())


def story(env: KVEvictVectorEnv) -> list[Any]:
    """Return all that three rows show through episodes of everything that changes their state."""
    rng, seen = np.random.default_rng(0), []

    def steps(number: int, dtype: type = np.float32) -> None:
        for _ in range(number):
            action = rng.uniform(-1, 1, env.action_space.shape).astype(dtype)
            device = env.dynamics.tokens.device
            seen.append(env.step(torch.as_tensor(action, device=device) if env.output == "torch" else action))

    seen.append(env.reset(seed=0, options={"trace": [0, 1, 2], "budget": [20, 18, 19]}))
    steps(3)
    seen.append(env.reset(options={"reset_mask": np.array([False, True, False]), "budget": 17}))
    steps(4)
    fork = env.snapshot()
    steps(3, np.float64)
    seen.append(env.restore(fork))
    steps(3)
    seen.append(env.reset())
    env.track({"queries", "query_moments", "last_attention"})
    steps(2)
    seen += [vars(state) for state in env.layer_states({"queries", "query_moments", "last_attention"})]
    seen.append(env.restore(fork))
    steps(3)
    state = {name: tensor for name, (tensor, _) in env.dynamics.cache.row_tensors().items()}
    return [*seen, state, vars(env.dynamics.counters), env.dynamics.finished]


def assert_same(one: Any, other: Any, atol: float = 0.0) -> None:
    """Fail unless two stories are the same: integers exactly, numbers up to a tolerance."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (list, tuple)) or (isinstance(one, np.ndarray) and one.dtype == object):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs, atol)
    elif isinstance(one, (Tensor, np.ndarray)):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        torch.testing.assert_close(one, other, rtol=0, atol=atol if one.is_floating_point() else 0)
    elif isinstance(one, (bool, int, float, type(None))):
        assert one == other


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("features", "output"), [("kv", "numpy"), ("foresight", "torch"), ("stats", "torch")])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_captured_episodes_are_the_others(mode: str, features: str, output: str) -> None:
    arguments = {"autoreset_mode": mode, "features": features, "output": output, "max_episode_steps": 5}
    plain = story(vector(3, **arguments, reward="foresight"))
    assert_same(plain, story(vector(3, **arguments, reward="foresight", cuda_graph=True)))


@pytest.mark.usefixtures("stand_in")
def test_a_warm_step_runs_no_python_of_the_model() -> None:
    env = vector(2, cuda_graph=True, output="torch")
    env.reset(seed=0)
    ran = []
    hook = env.dynamics.model.base_model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        env.step(torch.zeros(env.action_space.shape))
        assert len(ran) == WARM_UP_CALLS + 1
        env.step(torch.zeros(env.action_space.shape))
        assert len(ran) == WARM_UP_CALLS + 1
    finally:
        hook.remove()


def counting() -> str:
    """Register features that count how often Python computed them."""
    if "counting" not in FEATURES:
        number = count()
        kvenv.register_features(
            "counting", lambda state: torch.full((*state.positions.shape, 1), float(next(number))), 1
        )
    return "counting"


@pytest.mark.usefixtures("stand_in")
def test_what_depends_on_the_host_shows() -> None:
    env = vector(1, cuda_graph=True, features=counting())
    first, *_ = env.reset(seed=0)
    second, *_ = env.step(np.zeros(env.action_space.shape, np.float32))
    filled = second["positions"] >= 0
    assert len(np.unique(first["features"][0, 0][filled[0, 0]])) == 1
    np.testing.assert_array_equal(first["features"][filled], second["features"][filled])


@pytest.mark.usefixtures("stand_in")
def test_graphs_over_a_cache_that_was_replaced_show(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Dynamics._take

    def take_but_the_graphs(self: Dynamics, cache: SlotCache) -> None:
        before = getattr(self, "graphs", None)
        take(self, cache)
        self.graphs = before or self.graphs

    monkeypatch.setattr(Dynamics, "_take", take_but_the_graphs)
    with pytest.raises(ReferenceError, match=GONE):
        story(vector(3, cuda_graph=True))


def reading_back() -> str:
    """Register features that ask the device for a number."""

    def features(state: LayerState) -> Tensor:
        return state.positions[..., None].float() / float(state.positions.max())

    if "reading-back" not in FEATURES:
        kvenv.register_features("reading-back", features, 1)
    return "reading-back"


@pytest.mark.usefixtures("stand_in")
def test_what_reads_back_cannot_be_captured() -> None:
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        vector(1, cuda_graph=True, features=reading_back()).reset(seed=0)


@pytest.fixture
def total() -> tuple[Graphs, Tensor]:
    """Graphs over a running total."""
    total = torch.zeros(2)
    return Graphs(total.device, [total]), total


@pytest.mark.usefixtures("stand_in")
def test_a_call_that_is_captured_happens_once(total: tuple[Graphs, Tensor]) -> None:
    captured, x = total

    def add(y: Tensor) -> dict[str, Tensor]:
        x.add_(y)
        return {"total": x, "twice": 2 * y}

    first = captured.run("add", add, torch.ones(2))
    second = captured.run("add", add, torch.full((2,), 3.0))
    assert (first["total"].tolist(), first["twice"].tolist()) == ([1, 1], [2, 2])
    assert (second["total"].tolist(), second["twice"].tolist()) == ([4, 4], [6, 6])
    assert captured.warm_up_seconds > 0
    assert captured.capture_seconds > 0
    # Another dtype is another capture, over the same state.
    third = captured.run("add", add, torch.ones(2, dtype=torch.float64))
    assert third["total"].tolist() == [5, 5]
    assert third["twice"].dtype is torch.float64


@pytest.mark.usefixtures("stand_in")
def test_a_call_that_fails_leaves_the_state_as_it_was(total: tuple[Graphs, Tensor]) -> None:
    captured, x = total

    def fail() -> dict[str, Tensor]:
        raise ValueError(f"after {x.add_(1)}")

    with pytest.raises(ValueError, match="after"):
        captured.run("fail", fail)
    assert x.tolist() == [0, 0]


@pytest.mark.usefixtures("stand_in")
def test_a_capture_in_inference_mode_serves_outside_too(total: tuple[Graphs, Tensor]) -> None:
    captured, x = total

    def add(y: Tensor) -> dict[str, Tensor]:
        return {"total": x.add_(y)}

    with torch.inference_mode():
        captured.run("add", add, torch.ones(2))
    assert captured.run("add", add, torch.ones(2))["total"].tolist() == [2, 2]


def test_what_cannot_be_captured_is_refused() -> None:
    with pytest.raises(ValueError, match="cuda_graph=True needs the model on a CUDA device, not on 'cpu'"):
        vector(1, cuda_graph=True)
    with pytest.raises(ValueError, match="schedule 'prefill' decode what is left of a trace: take schedule 'periodic'"):
        vector(1, cuda_graph=True, schedule="prefill")


@pytest.mark.usefixtures("stand_in")
def test_a_model_that_looks_at_its_positions_is_refused() -> None:
    settings: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    config = AutoConfig.for_model("llama", **settings, num_hidden_layers=1, rope_parameters=rope)
    with pytest.raises(ValueError, match="LlamaForCausalLM with rotary type 'dynamic' looks at its positions"):
        graphs.refuse_what_cannot_be_captured(AutoModelForCausalLM.from_config(config), periodic=True)


@pytest.mark.usefixtures("stand_in")
def test_a_call_whose_tensors_are_gone_shows() -> None:
    captured, held = Graphs(torch.device("cpu")), [torch.ones(2)]

    def double() -> dict[str, Tensor]:
        return {"double": 2 * held[0]}

    assert captured.run("double", double)["double"].tolist() == [2, 2]
    held[0] = torch.ones(2)
    with pytest.raises(ReferenceError, match=GONE):
        captured.run("double", double)


class Devices(Watch):
    """Remembers operations with a tensor that isn't on the device ``meta``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note the operation and run it."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
        self.offences += [str(func) for x in tensors if isinstance(x, Tensor) and x.device.type != "meta"]
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_needs_no_number_and_no_tensor_of_the_host(
    any_model: PreTrainedModel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on the device ``meta`` hold nothing: a read-back fails. It isn't the host: copies show."""
    monkeypatch.setattr(dynamics, "refuse_what_cannot_fit", lambda *_: None)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(any_model.config), dtype=dtype).to("meta")
    use_kvenv_attention(model)
    source = load_traces(RAGGED, trace_length=LENGTH, tokenizer=None)
    limits = Limits(LENGTH, BUDGET, INTERVAL, True, PROTECTION)
    for features in ("kv", "foresight", "stats", "pre-rope"):
        rows = Dynamics(LoadedModel("meta", model, None), source, rows=2, limits=limits, features=feature_set(features))
        for precision in (torch.float32, torch.float64):
            priorities = torch.zeros(rows.cache.positions.shape, dtype=precision, device="meta")
            with Devices() as watch, torch.no_grad():
                rows._turn(priorities)
                rows.observe()
            assert watch.offences == []
