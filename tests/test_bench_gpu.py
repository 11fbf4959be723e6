"""The section that measures a GPU, at tiny sizes on the CPU with a stand-in for CUDA graphs: tokens and arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import kvenv
from agents.keydiff import KeyDiff
from experiments.bench import GPU_ONLY, SECTIONS, __main__, gpu
from experiments.bench.machine import Machine
from experiments.bench.measure import Side, Times
from experiments.bench.models import SHAPES, in_shape, work
from experiments.bench.tokens import EvictingTokens, StaticTokens, ToldCache, full_tokens, told_tokens
from experiments.cli import run
from kvenv import graphs
from kvenv.state import Protection
from tests.models import random_tokens
from tests.policies import kvenv_model
from tests.replay import Replay
from tests.test_generation import generate

SIZES = gpu.Sizes(budget=16, interval=4, rows=2, lengths=(2, 10, 40), repeats=2)
PROTECTION = Protection(1, 4)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture on the CPU."""
    monkeypatch.setattr(graphs, "backend", Replay())


@pytest.fixture
def model() -> PreTrainedModel:
    """A model in the dtype that the bundled one has."""
    return kvenv_model(dtype=torch.float32)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("policy", ["scorer", "bare"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_the_captured_loop_tells_the_tokens_of_generate(architecture: str, policy: str, captured: bool) -> None:
    model, prompt, new = kvenv_model(architecture), random_tokens(2, 21), 30
    chosen = gpu.scorer(model) if policy == "scorer" else KeyDiff()
    terms: dict[str, Any] = {"budget": 16, "interval": 4, "protection": PROTECTION}
    theirs = kvenv.EvictingCache(model, chosen, **terms)
    told = generate(model, prompt, torch.ones_like(prompt), theirs, new)
    ours = ToldCache(model, chosen, **terms)
    ours.captured = captured
    with torch.no_grad():
        first = model(prompt, past_key_values=ours, logits_to_keep=1).logits.argmax(-1)
    tokens, found = told_tokens(ours, first), [prompt, first]
    for _ in range(new - 1):
        ours.next_token()
        found.append(tokens.next())
    assert torch.equal(torch.cat(found, dim=1), told)
    assert (ours.graphs is not None) == captured
    assert torch.equal(ours.positions, theirs.positions)
    full = generate(model, prompt, torch.ones_like(prompt), None, new)
    assert not torch.equal(told, full), "evicting changed nothing, so the test tests nothing"


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_over_random_pairs_keep_the_budget_and_the_newest(dtype: torch.dtype, captured: bool) -> None:
    model = kvenv_model(dtype=dtype)
    tokens = EvictingTokens(model, gpu.scorer(model), rows=3, budget=16, interval=4, captured=captured)
    held = tokens.cache.positions
    assert held.sort().values.tolist() == torch.arange(20).expand(held.shape).tolist()
    for window in range(3):
        tokens.evict()
        tokens.decode()
        held = tokens.cache.positions.sort().values
        end = 24 + 4 * window
        assert held.shape[-1] == 20
        assert held[..., -8:].tolist() == torch.arange(end - 8, end).expand(*held.shape[:3], 8).tolist()
        assert tokens.cache.get_seq_length() == end


@pytest.mark.usefixtures("stand_in")
def test_static_tokens_are_those_of_a_static_cache(model: PreTrainedModel) -> None:
    tokens, cache = StaticTokens(model, 6, 12), StaticCache(config=model.config, max_cache_len=12)
    cache.early_initialization(1, 2, 16, model.dtype, model.device)
    token = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(2):
        told = tokens.decode(6)
        for layer in cache.layers:
            layer.cumulative_length.fill_(6)
        for position in range(6, 12):
            with torch.no_grad():
                # Without a mask of ours the model makes its own.
                logits = model(token, past_key_values=cache, position_ids=torch.tensor([[position]])).logits
            token = logits.argmax(-1)
        assert torch.equal(told, token)


@pytest.mark.usefixtures("stand_in")
def test_a_full_token_sees_all_pairs_up_to_its_length(model: PreTrainedModel) -> None:
    prompt, cache = random_tokens(2, 9), DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        pairs = [torch.stack([layer.keys, layer.values]) for layer in cache.layers]
        for length in (3, 7):
            expected = model(torch.cat([prompt[:, : length - 1], torch.zeros(2, 1, dtype=torch.int64)], 1)).logits
            found = full_tokens(model, [x.clone() for x in pairs], length).next()
            assert torch.equal(found, expected[:, -1:].argmax(-1))


def timed(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str], list[float]]) -> list[str]:
    """Let every side be called twice and take what ``seconds`` says; return the list of calls to come."""
    calls: list[str] = []

    def alternate(sides: dict[str, Side], repeats: int, **_: object) -> Times:
        for _ in range(2):
            for name, side in sides.items():
                side()
                calls.append(name)
        return {name: np.array(seconds(name)) for name in sides}

    monkeypatch.setattr(gpu, "alternate", alternate)
    return calls


@pytest.mark.usefixtures("stand_in")
def test_decoding_is_compared_with_bandwidth_and_static_cache(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    eviction, window = "features, scorer and eviction", "decoding 4 tokens"
    taken = {
        eviction: [0.1, 0.1], window: [1.9, 1.9], "StaticCache": [4.0, 4.0],
        f"{eviction}, not captured": [0.2, 0.2], f"{window} after that": [2.0, 2.0],
    }  # fmt: skip
    timed(monkeypatch, taken.__getitem__)
    moved = sum(work(model, 1, 1, 16 + number)[0] for number in range(4))
    machine = Machine(bytes_per_second=moved / 1.5, flops=1e30)
    loop, share, part, eager, *captures = gpu.decoding("m", model, gpu.scorer(model), machine, SIZES, "cpu")
    assert (loop.case, loop.metric, loop.unit) == ("m, batch 1, budget 16", "EvictingCache / StaticCache", "tokens/s")
    assert (loop.value, loop.baseline, loop.ratio, loop.floor) == pytest.approx((2.0, 1.0, 2.0, 4 / 1.5))
    assert (share.value, share.baseline, share.ratio) == pytest.approx((moved / 2e9, moved / 1.5e9, 0.75))
    assert (part.metric, part.ratio) == (f"{eviction} / {window}", pytest.approx(0.1 / 1.9))
    assert (share.met, part.met) == (True, False)
    assert eager.ratio == pytest.approx(0.2 / 1.9)
    captured = ("EvictingCache", "StaticCache", "eviction")
    names = [f"{what}, {cache}" for cache in captured for what in ("warm-up", "capture")]
    assert [row.metric for row in captures] == names
    assert all(row.value > 0 for row in captures)


def test_the_bytes_of_a_token_are_weights_keys_and_values() -> None:
    """By hand: 7,615,616,512 weights less the embedding, and 2 x 28 x 4 x 128 numbers a pair, of two bytes each."""
    model = in_shape("Qwen2.5-7B", "meta")
    assert work(model, 1, 1, 1024)[0] == 2 * (7_615_616_512 - 152_064 * 3584 + 1024 * 28_672)
    # The other one's embedding is its head, and read.
    assert work(in_shape("Qwen3-4B", "meta"), 1, 1, 1024)[0] == 2 * (4_022_468_096 + 1024 * 73_728)
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert not any(x.requires_grad for x in model.parameters())


def test_what_lies_between_lengths_is_linear() -> None:
    # From 0 to 10 the mean is 2, from 10 to 40 it is 6.
    assert gpu.mean_between((0, 10, 40), [1.0, 3.0, 9.0]) == pytest.approx((10 * 2 + 30 * 6) / 40)


@pytest.mark.usefixtures("stand_in")
def test_rates_count_evictions_and_all_lengths(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"eviction": [0.5, 0.5], "window": [1.5, 1.5], "2": [1.0] * 2, "10": [3.0] * 2, "40": [9.0] * 2}
    calls = timed(monkeypatch, taken.__getitem__)
    assert gpu.evicting_rate(model, gpu.scorer(model), SIZES, "cpu", 5) == pytest.approx(5 * 4 / 2)
    assert calls == ["eviction", "window"] * 2
    assert gpu.full_rate(model, SIZES, "cpu", 5) == pytest.approx(5 / ((8 * 2 + 30 * 6) / 38))
    assert calls[4:] == ["2", "10", "40"] * 2


def test_the_largest_batch_is_tried_and_cut_by_tenths(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def attempt(rows: int) -> float:
        tried.append(rows)
        if rows > 40:
            raise torch.OutOfMemoryError
        return 2.0 * rows

    def peak(prepare: Callable[..., Side], *arguments: object, device: str) -> int:
        prepare(*arguments)()
        return 80

    # Four rows took 80 bytes, and 95% of 1,000 hold 47 such rows.
    monkeypatch.setattr(gpu, "peak", peak)
    monkeypatch.setattr(gpu, "free", lambda: 1000)
    assert gpu.largest(attempt, 4, "cpu") == (37, 74.0)
    assert tried == [4, 47, 42, 37]
    with pytest.raises(torch.OutOfMemoryError):
        gpu.largest(lambda rows: attempt(99), 4, "cpu")


@pytest.mark.usefixtures("stand_in")
def test_throughput_is_that_of_the_largest_batches(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "largest", lambda attempt, pilot, device: (3 * pilot, 6.0 * pilot))
    rate, rows = gpu.throughput("m", model, gpu.scorer(model), SIZES, "cpu")
    assert (rate.case, rate.value, rate.baseline, rate.ratio, rate.met) == ("m, 40 tokens", 96, 6, 16, True)
    assert (rows.value, rows.baseline, rows.ratio) == (48, 3, 16)


@pytest.mark.usefixtures("stand_in")
def test_steps_of_the_environment_are_compared_with_a_bare_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(SHAPES["Qwen2.5-7B"], vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    tiny = settings | {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(SHAPES, "tiny-qwen2", tiny)
    timed(monkeypatch, {"step, captured": [2.0, 2.0], "bare forward, captured": [1.0, 1.0]}.__getitem__)
    # Its protection, 4 sinks and 16 newest, takes that.
    sizes = gpu.Sizes(budget=24, interval=4, rows=2, repeats=2)
    step, *captures = gpu.environment("tiny-qwen2", in_shape("tiny-qwen2", "cpu"), sizes, "cpu")
    assert (step.case, step.unit) == ("tiny-qwen2 in the environment, batch 2", "tokens/s")
    assert (step.value, step.baseline, step.ratio, step.met) == (4.0, 8.0, 0.5, False)
    assert [row.metric for row in captures] == ["warm-up, step", "capture, step"]


def test_a_gpu_is_asked_for_by_name_or_by_device(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(__main__.main, ["gpu", "--out", str(tmp_path)])
    assert "section 'gpu' measures a GPU, not 'cpu': take --device cuda" in capsys.readouterr().err
    ran: list[str] = []

    class Section:
        def __init__(self, name: str) -> None:
            self.name = name.rpartition(".")[2]

        def rows(self, device: str) -> list[Any]:
            ran.append(self.name)
            return []

    monkeypatch.setattr(__main__, "import_module", Section)
    monkeypatch.setattr(__main__, "facts", lambda device: {})
    for device, expected in (("cpu", [x for x in SECTIONS if x not in GPU_ONLY]), ("cuda", list(SECTIONS))):
        ran.clear()
        __main__.main(["--device", device, "--out", str(tmp_path)])
        assert ran == expected
    assert "gpu" in SECTIONS
