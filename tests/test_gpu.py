"""What must also hold on a GPU; skipped where there is none. The one command: ``pytest tests/test_gpu.py``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import agents
from agents.imitation import ImitationConfig, ImitationLearner
from kvenv import fused
from kvenv.attention import BEYOND
from kvenv.golden import RecordingCache, Reduce, future_attention
from kvenv.layerwise import rollout
from kvenv.models import load_model
from kvenv.traces import load_traces
from kvenv.vector_env import KVEvictVectorEnv
from tests.environments import vector
from tests.test_determinism import story as digests
from tests.test_graphs import assert_same, story

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CAUSAL = [name for name in agents.names(trained=False) if not name.startswith("golden")]


@pytest.fixture
def syncs_are_errors() -> Iterator[None]:
    """Let any host-device synchronisation raise."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def warm_env(features: str, **changes: object) -> tuple[KVEvictVectorEnv, torch.Tensor]:
    """Return an environment on the GPU, a few steps into its episodes, and an action."""
    env = KVEvictVectorEnv(8, traces="recall", features=features, device="cuda", output="torch", **changes)  # type: ignore[arg-type]
    env.reset(seed=0)
    action = torch.rand(env.action_space.shape, device="cuda") * 2 - 1
    for _ in range(3):
        env.step(action)
    torch.cuda.synchronize()
    return env, action


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("features", ["kv", "foresight", "stats"])
def test_a_warm_step_never_waits_for_the_device(
    features: str, cuda_graph: bool, request: pytest.FixtureRequest
) -> None:
    env, action = warm_env(features, cuda_graph=cuda_graph)
    request.getfixturevalue("syncs_are_errors")
    env.step(action)


@pytest.mark.parametrize(("features", "dtype"), [("kv", "float32"), ("kv", "bfloat16"), ("foresight", "float32")])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_captured_episodes_are_the_others(mode: str, features: str, dtype: str) -> None:
    arguments = {"model": "tiny", "device": "cuda", "dtype": dtype, "output": "torch", "features": features}
    plain, captured = (
        story(vector(3, **arguments, autoreset_mode=mode, max_episode_steps=5, cuda_graph=cuda_graph))
        for cuda_graph in (False, True)
    )
    # The same kernels on the same numbers, but libraries may choose them by more than shapes.
    assert_same(plain, captured, atol=1e-4 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("name", CAUSAL)
def test_rollouts_agree_with_the_cpu(name: str) -> None:
    nll = {}
    for device in ("cpu", "cuda"):
        loaded = load_model("tiny", device=device)
        source = load_traces("recall", split="validation", tokenizer=loaded.tokenizer, trace_length=256)
        done = rollout(agents.make(name), [source[0], source[1]], model=loaded.model, budget=48, interval=16)
        nll[device] = done.losses.nll.cpu()
    # A near tie may fall the other way on another device; it may not move what is lost on the whole.
    assert abs(float(nll["cpu"].mean() - nll["cuda"].mean())) < 0.02


def test_golden_utilities_agree_with_the_cpu() -> None:
    utility = []
    for device in ("cpu", "cuda"):
        loaded = load_model("tiny", device=device)
        tokens = load_traces("tracking", tokenizer=loaded.tokenizer, trace_length=256)[0].tokens
        future, *_ = future_attention(loaded.model, [tokens], interval=16, anchors=80)
        utility.append(future.utility.cpu())
    torch.testing.assert_close(*utility, atol=1e-3, rtol=1e-3)


def test_bfloat16_stays_close_to_float32() -> None:
    means = []
    for dtype in ("float32", "bfloat16"):
        loaded = load_model("tiny", device="cuda", dtype=dtype)
        source = load_traces("recall", split="validation", tokenizer=loaded.tokenizer)
        traces = [source[0], source[1]]
        done = rollout(agents.make("streaming"), traces, model=loaded.model, budget=128, interval=16)
        means.append(float(done.losses.nll.mean()))
    assert abs(means[0] - means[1]) < 0.05


def test_two_processes_compute_the_same_bits_there() -> None:
    plain = digests("cuda", "off", of="env"), digests("cuda", "off", of="env")
    assert plain[0] == plain[1], "the spec says that a step is deterministic"
    asked = digests("cuda", "on", of="all"), digests("cuda", "on", of="all")
    assert asked[0] == asked[1]


def test_imitation_trains_there() -> None:
    loaded = load_model("tiny", device="cuda")
    source = load_traces("recall", tokenizer=loaded.tokenizer)
    learner = ImitationLearner(loaded.model, source, ImitationConfig(updates=6, num_traces=8))
    losses = [learner.update()["loss/ranking"] for _ in range(6)]
    assert sum(losses[-2:]) < sum(losses[:2])


@pytest.mark.parametrize("dtype", fused.DTYPES)
@pytest.mark.parametrize("head_dim", [48, 64, 96, 128])
@pytest.mark.parametrize(("queries", "slots"), [(1, 1), (16, 1280), (256, 1280), (256, 8192)])
def test_fused_attention_is_that_of_pytorch(dtype: torch.dtype, head_dim: int, queries: int, slots: int) -> None:
    rng = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(2, 4, 4, queries, head_dim, generator=rng, device="cuda").to(dtype)
    key, value = torch.randn(2, 2, slots, 4, head_dim, generator=rng, device="cuda").to(dtype).transpose(2, 3)
    held = torch.rand(2, 4, 1, slots, generator=rng, device="cuda").argsort(dim=-1).float()
    held = torch.where(held < slots // 10, BEYOND, held)
    reach = torch.arange(slots - queries, slots, device="cuda").float()[:, None] - slots // 2
    weights = torch.rand(2, 5, queries, generator=rng, device="cuda") * (torch.arange(queries, device="cuda") >= 3)
    case = (query, key, value, reach, held, weights, head_dim**-0.5)
    rounding = max(1e-4, 4 * torch.finfo(dtype).eps)
    for extremes, largest_of_group in ((True, False), (False, False), (False, True)):
        options = {"extremes": extremes, "largest_of_group": largest_of_group}
        ours, exact = fused.attend(*case, **options), fused.reference(*case, **options)
        torch.testing.assert_close(ours.output.double(), exact.output, rtol=rounding, atol=rounding)
        torch.testing.assert_close(ours.sums.double(), exact.sums, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.extremes.double(), exact.extremes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_attention_serves_there(dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    model = load_model("tiny", device="cuda", dtype=dtype).model
    head_dim = RecordingCache(model, interval=16).head_dim
    assert fused.serves(torch.zeros(1, head_dim, dtype=model.dtype, device="cuda")), caplog.text


@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_fused_and_unfused_golden_agree(reduce: Reduce, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model("tiny", device="cuda")
    tokens = load_traces("tracking", tokenizer=loaded.tokenizer, trace_length=512)[0].tokens
    utility = []
    for _ in range(2):
        future, *_ = future_attention(loaded.model, [tokens], interval=16, anchors=80, reduce=reduce)
        utility.append(future.utility)
        monkeypatch.setattr(fused, "serves", lambda query: False)
    torch.testing.assert_close(*utility, atol=1e-4, rtol=1e-4)
