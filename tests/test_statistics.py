"""Window statistics and query moments against plain per-query loops, with evictions and slot reuse."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from kvenv.attention import use_kvenv_attention
from kvenv.layerwise import rollout
from kvenv.rotary import Rotary
from kvenv.state import LayerState, Protection
from kvenv.statistics import newest
from tests.models import ARCHITECTURES, random_model
from tests.policies import Mixed, Recorder, kvenv_model, random_traces
from tests.reference import MaskedRun, masked_run, window_statistics, windows

OBSERVED = ("stats", "last_attention", "queries", "query_moments")


def unrotate(model: torch.nn.Module, queries: torch.Tensor) -> torch.Tensor:
    """Rotate queries (T, D) of positions 0, 1, ... back, by the model's own cosines and sines."""
    positions = torch.arange(len(queries))[None]
    cos, sin = (x[0] for x in model.base_model.rotary_emb(queries[None, None], positions))
    rotated, rest = queries[:, : cos.shape[-1]], queries[:, cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat([rotated * cos - torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def check_state(state: LayerState, row: int, model: torch.nn.Module, run: MaskedRun, first_decision: int) -> None:
    """Compare one row of a state with what a plain run says about it."""
    at, interval = int(state.next_position[row]), state.interval
    spans = windows(at, first_decision, interval)
    assert spans[-1].stop == at
    attention, queries = run.attention[state.layer], run.queries[state.layer]
    for head, group in ((head, group) for head in range(2) for group in range(2)):
        rows = attention[head * 2 + group]
        for slot, position in enumerate(state.positions[row, head].tolist()):
            if position < 0:
                continue
            expected = window_statistics(rows, spans, position)
            actual = state.stats[row, head, group, slot].tolist()
            assert actual == pytest.approx(expected, rel=0, abs=1e-9)
            assert float(state.last_attention[row, head, group, slot]) == pytest.approx(
                rows[at - 1, position], abs=1e-9
            )
        window = queries[head * 2 + group, spans[-1].start : at]
        valid = state.query_valid[row]
        assert int(valid.sum()) == len(spans[-1])
        torch.testing.assert_close(state.queries[row, head, group][valid], window, rtol=0, atol=1e-9)
        past = unrotate(model, queries[head * 2 + group, :at]).numpy()
        np.testing.assert_allclose(state.query_mean[row, head, group], past.mean(0), atol=1e-6)
        np.testing.assert_allclose(state.query_cov[row, head, group], np.cov(past.T, bias=True), atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=3)
@given(
    lengths=st.lists(st.integers(25, 40), min_size=1, max_size=2),
    budget=st.integers(6, 12),
    interval=st.integers(1, 11),
    seed=st.integers(0, 100),
)
def test_states_equal_plain_loops(architecture: str, lengths: list[int], budget: int, interval: int, seed: int) -> None:
    # Two passes: the first says what is evicted, the masked reference runs on that, the second compares every state.
    model, traces = kvenv_model(architecture), random_traces(lengths, seed=seed)
    options = {"model": model, "budget": budget, "interval": interval, "protection": Protection(1, 1), "seed": seed}
    recorder = Recorder(model, traces)
    rollout(Mixed(*OBSERVED), traces, on_eviction=recorder, **options)
    runs = [masked_run(model, trace.tokens, recorder.of(row, trace)) for row, trace in enumerate(traces)]
    compared = 0

    def compare(state: LayerState, order: torch.Tensor, count: torch.Tensor) -> None:
        nonlocal compared
        for row, trace in enumerate(traces):
            if int(state.next_position[row]) < len(trace.tokens) - 1:
                check_state(state, row, model, runs[row], budget + interval)
                compared += 1

    rollout(Mixed(*OBSERVED), traces, on_eviction=compare, **options)
    assert compared == sum(2 * max(0, -(-(length - 1 - budget - interval) // interval)) for length in lengths)


def test_long_windows_tell_the_spans_apart() -> None:
    model, traces = kvenv_model(), random_traces([130])
    options = {"model": model, "budget": 50, "interval": 40, "protection": Protection(1, 1)}
    recorder = Recorder(model, traces)
    rollout(Mixed(*OBSERVED), traces, on_eviction=recorder, **options)
    run = masked_run(model, traces[0].tokens, recorder.of(0, traces[0]))
    rollout(
        Mixed(*OBSERVED),
        traces,
        on_eviction=lambda state, *_: check_state(state, 0, model, run, 90),
        **options,
    )


def partly_rotated() -> torch.nn.Module:
    """Return a model that rotates three quarters of each head, as Phi-4-mini does."""
    config = copy.deepcopy(random_model("phi3").config)
    config.rope_parameters["partial_rotary_factor"] = 0.75
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().requires_grad_(False)
    use_kvenv_attention(model)
    return model


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "partly rotated"])
def test_rotation_is_the_models_own(architecture: str) -> None:
    partly = architecture == "partly rotated"
    model = partly_rotated() if partly else kvenv_model(architecture)
    assert 2 * len(Rotary.of(model).inv_freq) == {True: 6, False: 16 if architecture == "qwen3" else 8}[partly]
    rotary, run = Rotary.of(model), masked_run(model, random_traces([40])[0].tokens)
    for keys in run.keys:
        for head in keys:
            flat = unrotate(model, head)
            positions = torch.arange(39)
            torch.testing.assert_close(rotary.rotate(flat, positions), head, rtol=0, atol=1e-6)
            torch.testing.assert_close(rotary.unrotate(head, positions), flat, rtol=0, atol=1e-6)
            assert (rotary.rotate(flat, positions + 1) - head).abs().max() > 1e-2


def test_part_of_the_dimensions_and_a_scaled_rotation() -> None:
    rotary = Rotary(torch.tensor([1.0, 0.1, 0.01]), scaling=1.25)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.tensor([0, 1, 7, 100, 1000])
    turned = rotary.rotate(x, positions)
    assert torch.equal(turned[:, 6:], x[:, 6:])
    torch.testing.assert_close(turned[:, :6].norm(dim=-1), 1.25 * x[:, :6].norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rotary.unrotate(turned, positions), x, rtol=0, atol=1e-6)
    for i, angle in enumerate(rotary.inv_freq.tolist()):
        pair = torch.complex(x[:, i], x[:, i + 3]) * 1.25 * torch.exp(1j * angle * positions.double())
        torch.testing.assert_close(turned[:, i], pair.real, rtol=0, atol=1e-4)
        torch.testing.assert_close(turned[:, i + 3], pair.imag, rtol=0, atol=1e-4)


def test_a_model_without_rotation_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no rotary position embedding"):
        Rotary.of(torch.nn.Linear(2, 2))


def test_newest_pads_in_front() -> None:
    x = torch.arange(6).view(2, 3)
    assert newest(x, 2, 1).tolist() == [[1, 2], [4, 5]]
    assert newest(x, 5, 1).tolist() == [[0, 0, 0, 1, 2], [0, 0, 3, 4, 5]]
