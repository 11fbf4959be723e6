"""Putting traces side by side, and the scores of known tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvenv import decode
from kvenv.cache import SlotCache
from kvenv.decode import collate, feed, full_cache_losses
from tests.models import ARCHITECTURES
from tests.policies import kvenv_model, random_traces
from tests.reference import copy_with, plain_losses


@given(
    rows=st.lists(st.tuples(st.integers(2, 30), st.integers(0, 20)), min_size=1, max_size=4),
    interval=st.integers(1, 9),
    stop=st.sampled_from([None, -1, 7]),
)
def test_a_batch_lays_every_fed_token_out_once(rows: list[tuple[int, int]], interval: int, stop: int | None) -> None:
    traces = [np.arange(100, 100 + length) for length, _ in rows]
    anchors = [anchor for _, anchor in rows]
    batch = collate(traces, anchors=anchors, interval=interval, stop=stop)
    columns = batch.tokens.shape[1]
    assert columns % interval == 0
    boundary = {int(pad) + anchor for pad, anchor in zip(batch.pad, anchors, strict=True)}
    assert len(boundary) == 1
    assert boundary.pop() % interval == 0
    for row, (length, anchor) in enumerate(rows):
        fed = length - 1 if stop is None else min(length - 1, anchor if stop < 0 else stop)
        where = batch.valid[row]
        assert batch.tokens[row, where].tolist() == list(range(100, 100 + fed))
        assert batch.targets[row, where].tolist() == list(range(101, 101 + fed))
        assert batch.positions[row, where].tolist() == list(range(fed))
        assert (batch.positions[row].diff() == 1).all()
        assert not batch.tokens[row, ~where].any()


@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=4), interval=st.integers(1, 6), seed=st.integers(0, 9))
def test_by_position_is_zero_beyond_each_trace(lengths: list[int], interval: int, seed: int) -> None:
    anchors = np.random.default_rng(seed).integers(0, 15, len(lengths)).tolist()
    batch = collate([np.arange(1, 1 + length) for length in lengths], anchors=anchors, interval=interval)
    by_target = batch.by_position(batch.targets * batch.valid, 25)
    for row, length in enumerate(lengths):
        assert by_target[row].tolist() == [*range(2, length + 1), *[0] * (26 - length)]
    assert batch.by_position(batch.valid, 25).dtype == torch.bool


@pytest.mark.parametrize("logits_at_once", [1 << 24, 200, 1])
def test_scores_are_those_of_the_plain_logits(logits_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LOGITS_AT_ONCE", logits_at_once)
    monkeypatch.setattr(decode, "STATES_AT_ONCE", 1)
    model, traces = kvenv_model(), random_traces([30, 19])
    batch = collate([trace.tokens for trace in traces], anchors=[11, 7], interval=4)
    cache = SlotCache(model, rows=2, capacity=40, interval=4, budget=36)
    losses = feed(model, cache, batch.tokens, batch.targets, batch.positions, batch.valid)
    for row, trace in enumerate(traces):
        ids = torch.as_tensor(trace.tokens)[None]
        with torch.no_grad():
            logits = copy_with(model, "sdpa")(ids[:, :-1]).logits[0]
        where = batch.valid[row]
        distribution = torch.distributions.Categorical(logits=logits)
        torch.testing.assert_close(losses.nll[row, where], -distribution.log_prob(ids[0, 1:]), rtol=0, atol=1e-9)
        torch.testing.assert_close(losses.entropy[row, where], distribution.entropy(), rtol=0, atol=1e-9)
        assert torch.equal(losses.correct[row, where], logits.argmax(-1) == ids[0, 1:])
        for x in (losses.nll, losses.entropy, losses.correct):
            assert not x[row, ~where].any()


def test_losses_of_half_precision_models_are_float32() -> None:
    model, traces = kvenv_model("qwen3", torch.bfloat16), random_traces([20])
    batch = collate([traces[0].tokens])
    cache = SlotCache(model, rows=1, capacity=20, interval=4, budget=16)
    losses = feed(model, cache, batch.tokens, batch.targets, batch.positions, batch.valid)
    assert losses.nll.dtype == losses.entropy.dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_cache_losses_are_the_plain_ones(architecture: str) -> None:
    model, traces = kvenv_model(architecture), random_traces([30, 12, 21])
    losses = full_cache_losses(model, [trace.tokens for trace in traces])
    assert losses.nll.shape == (3, 29)
    for row, trace in enumerate(traces):
        fed = len(trace.tokens) - 1
        torch.testing.assert_close(losses.nll[row, :fed], plain_losses(model, trace.tokens), rtol=0, atol=1e-9)
        assert not losses.nll[row, fed:].any()
