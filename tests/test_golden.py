"""Future attention against materialised attention, golden's choice against all others, resampled futures."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvenv.golden import RecordingCache, expected_future, future_attention
from kvenv.layerwise import rollout
from kvenv.state import LayerState, Protection
from tests.models import ARCHITECTURES
from tests.policies import kvenv_model, random_traces
from tests.reference import copy_with, golden_utility, masked_run, plain_losses


def utilities_at(future, layer: int, rows: int, length: int, decision: list[int]) -> torch.Tensor:
    """Return the utilities (N, H, length) of all positions at one decision per row."""
    positions = torch.arange(length).expand(rows, 2, -1)
    return future.at(layer, positions, torch.tensor(decision))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reduce", ["max", "sum"])
@settings(max_examples=5)
@given(
    lengths=st.lists(st.integers(4, 45), min_size=1, max_size=3),
    anchor=st.integers(1, 25),
    interval=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_streaming_equals_materialised(
    architecture: str, reduce: str, lengths: list[int], anchor: int, interval: int, seed: int
) -> None:
    # Row r has its first decision r tokens later, so that rows are padded differently.
    model, traces = kvenv_model(architecture), random_traces(lengths, seed=seed)
    anchors = [anchor + row for row in range(len(traces))]
    tokens = [trace.tokens for trace in traces]
    future, losses, batch = future_attention(model, tokens, interval=interval, anchors=anchors, reduce=reduce)
    by_target = batch.by_position(losses.nll, max(lengths))
    for row, trace in enumerate(traces):
        run = masked_run(model, trace.tokens)
        fed = lengths[row] - 1
        torch.testing.assert_close(by_target[row, :fed], plain_losses(model, trace.tokens), rtol=0, atol=1e-9)
        assert not by_target[row, fed:].any(), "losses beyond the end of a trace"
        for layer, attention in enumerate(run.attention):
            for decision, expected in golden_utility(attention, 2, anchors[row], interval, reduce).items():
                next_position = [0] * len(traces)
                next_position[row] = decision
                actual = utilities_at(future, layer, len(traces), fed, next_position)[row, :, :decision]
                torch.testing.assert_close(actual, torch.as_tensor(expected[:, :decision]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_attention_is_the_models_own(architecture: str) -> None:
    # transformers' eager attention rounds probabilities to float32.
    model, trace = kvenv_model(architecture), random_traces([40])[0]
    ids = torch.as_tensor(trace.tokens)[None, :-1]
    with torch.no_grad():
        eager = copy_with(model, "eager")(ids, output_attentions=True).attentions
    for ours, theirs in zip(masked_run(model, trace.tokens).attention, eager, strict=True):
        np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=0, atol=1e-5)


def test_after_the_last_window_nothing_is_useful() -> None:
    model, trace = kvenv_model(), random_traces([30])[0]
    future, _, _ = future_attention(model, [trace.tokens], interval=6, anchors=10)
    assert utilities_at(future, 0, 1, 29, [28]).any()
    for beyond in (34, 40, 1000):
        assert not utilities_at(future, 0, 1, 29, [beyond]).any()


class Golden:
    """Keeps what will be attended to."""

    name, needs = "golden", frozenset({"future"})

    def __call__(self, state: LayerState) -> torch.Tensor:
        """Return the future."""
        return state.future


@pytest.mark.parametrize("reduce", ["max", "sum"])
@settings(max_examples=4)
@given(
    length=st.integers(14, 30),
    budget=st.integers(5, 8),
    interval=st.integers(1, 4),
    protection=st.builds(Protection, sinks=st.integers(0, 2), recent=st.integers(0, 2)),
)
def test_no_other_set_loses_less_than_goldens(
    reduce: str, length: int, budget: int, interval: int, protection: Protection
) -> None:
    model, trace = kvenv_model(), random_traces([length], seed=length)[0]
    capacity = budget + interval
    future, _, _ = future_attention(model, [trace.tokens], interval=interval, anchors=capacity, reduce=reduce)
    by_layer = [golden_utility(a, 2, capacity, interval, reduce) for a in masked_run(model, trace.tokens).attention]
    decisions = 0

    def check(state: LayerState, order: torch.Tensor, count: torch.Tensor) -> None:
        nonlocal decisions
        at = int(state.next_position)
        for head in range(2):
            number = int(count[0, head])
            if not number:
                continue
            useful = by_layer[state.layer][at][head]
            candidates = state.positions[0, head][state.mask[0, head]].tolist()
            gone = [int(state.positions[0, head, slot]) for slot in order[0, head, :number]]
            assert set(gone) <= set(candidates)
            least = min(sum(useful[p] for p in others) for others in combinations(candidates, number))
            assert sum(useful[p] for p in gone) <= least + 1e-9
            decisions += 1

    options = {"model": model, "budget": budget, "interval": interval, "protection": protection}
    rollout(Golden(), [trace], future=future, on_eviction=check, **options)
    assert decisions == 4 * max(0, -(-(length - 1 - capacity) // interval))


@pytest.mark.parametrize("reduce", ["max", "sum"])
@settings(max_examples=5)
@given(
    lengths=st.lists(st.integers(25, 45), min_size=1, max_size=3), anchor=st.integers(5, 20), interval=st.integers(1, 9)
)
def test_the_only_possible_future_is_golden(reduce: str, lengths: list[int], anchor: int, interval: int) -> None:
    model, traces = kvenv_model(), random_traces(lengths, seed=anchor)
    anchors = [anchor + row for row in range(len(traces))]
    tokens = [trace.tokens for trace in traces]
    decisions = [-(-(length - 1 - anchor) // interval) for length, anchor in zip(lengths, anchors, strict=True)]
    same = [[[trace] * 2 for _ in range(count)] for trace, count in zip(tokens, decisions, strict=True)]
    options = {"interval": interval, "anchors": anchors, "reduce": reduce}
    expected = expected_future(model, tokens, same, **options)
    golden, _, _ = future_attention(model, tokens, **options)
    for row, count in enumerate(decisions):
        for k in range(count):
            at = anchors[row] + k * interval
            for layer in range(2):
                ours, theirs = (
                    utilities_at(future, layer, len(traces), at, [0] * row + [at] + [0] * (len(traces) - row - 1))[row]
                    for future in (expected, golden)
                )
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_expected_utility_is_the_mean_over_continuations(reduce: str) -> None:
    model, anchor, interval = kvenv_model(), 13, 5
    trace = random_traces([37])[0].tokens
    futures = [
        [
            np.concatenate([trace[: anchor + k * interval], rest.tokens])
            for rest in random_traces([20 - k, 30, 9], seed=k)
        ]
        for k in range(4)
    ]
    expected = expected_future(model, [trace], [futures], interval=interval, anchors=[anchor], reduce=reduce)
    for k, continuations in enumerate(futures):
        at = anchor + k * interval
        for layer in range(2):
            mean = np.mean(
                [
                    golden_utility(masked_run(model, tokens).attention[layer], 2, anchor, interval, reduce)[at][:, :at]
                    for tokens in continuations
                ],
                axis=0,
            )
            actual = utilities_at(expected, layer, 1, at, [at])[0]
            torch.testing.assert_close(actual, torch.as_tensor(mean), rtol=0, atol=1e-9)


def test_misuse_is_refused() -> None:
    model = kvenv_model()
    with pytest.raises(ValueError, match="reduce 'mean' is unknown: known are max, sum"):
        future_attention(model, [random_traces([20])[0].tokens], interval=4, anchors=8, reduce="mean")
    with pytest.raises(ValueError, match="announced"):
        model(torch.ones(1, 4, dtype=torch.int64), past_key_values=RecordingCache(model, interval=4))
