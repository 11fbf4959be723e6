"""What the fused kernels compute, in Triton's interpreter on the CPU.

``tests/test_fused.py`` runs this in a process of its own, because Triton chooses the interpreter when it is imported.
Directly: ``TRITON_INTERPRET=1 python -m pytest tests/interpreted.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton import knobs
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kvenv import fused
from kvenv.attention import BEYOND
from kvenv.golden import future_attention
from kvenv.layerwise import rollout
from kvenv.state import LayerState, Protection
from kvenv.traces import Trace
from tests.policies import Mixed, Recorder, kvenv_model, random_traces
from tests.reference import golden_utility, masked_run, window_statistics, windows

pytestmark = [
    pytest.mark.skipif(not knobs.runtime.interpret, reason="TRITON_INTERPRET isn't set"),
    pytest.mark.filterwarnings("error::RuntimeWarning"),  # masked lanes overflow neither
]


@pytest.fixture(autouse=True, scope="module")
def _bfloat16_products() -> Iterator[None]:
    """Multiply bfloat16 as numbers: the interpreter stores it as integers and multiplies those."""
    interpreted = InterpreterBuilder.create_dot

    def dot(builder: Any, left: TensorHandle, right: TensorHandle, *rest: Any) -> TensorHandle:
        if left.dtype.scalar == tl.bfloat16:
            bits = (x.data.astype(np.uint32) << 16 for x in (left, right))
            left, right = (TensorHandle(x.view(np.float32), tl.float32) for x in bits)
        return interpreted(builder, left, right, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield


@pytest.mark.parametrize("dtype", fused.DTYPES)
def test_the_check_passes(dtype: torch.dtype) -> None:
    fused.check(torch.device("cpu"), dtype, 64)


@settings(max_examples=15)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (2, 2, 3, 70, 150))),
    head_dim=st.sampled_from([8, 32, 48, 64, 128]),
    dtype=st.sampled_from(fused.DTYPES),
    sums=st.integers(1, 5),
    options=st.sampled_from([{}, {"extremes": True}, {"largest_of_group": True}]),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_reference(
    shape: tuple[int, ...],
    head_dim: int,
    dtype: torch.dtype,
    sums: int,
    options: dict[str, bool],
    transposed: bool,
    seed: int,
) -> None:
    rows, heads, groups, queries, slots = shape
    rng = torch.Generator().manual_seed(seed)

    def pairs() -> Tensor:
        x = torch.randn(rows, slots, heads, head_dim, generator=rng).to(dtype).transpose(1, 2)
        return x if transposed else x.contiguous()

    query = torch.randn(rows, heads, groups, queries, head_dim, generator=rng).to(dtype)
    held = torch.rand(rows, heads, 1, slots, generator=rng).argsort(dim=-1).float()
    held[torch.rand(held.shape, generator=rng) < 0.3] = BEYOND
    reach = torch.randint(-5, slots + 5, (rows, 1, queries, 1), generator=rng).float()
    weights = torch.rand(rows, sums, queries, generator=rng) * (torch.rand(rows, 1, queries, generator=rng) < 0.7)
    case = (query, pairs(), pairs(), reach, held, weights, head_dim**-0.5)
    ours, exact = fused.attend(*case, **options), fused.reference(*case, **options)
    rounding = max(1e-5, 4 * torch.finfo(dtype).eps)
    assert ours.output.dtype is dtype
    torch.testing.assert_close(ours.output.double(), exact.output, rtol=rounding, atol=rounding)
    torch.testing.assert_close(ours.sums.double(), exact.sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.extremes.double(), exact.extremes, rtol=1e-5, atol=1e-5)


@pytest.fixture
def always_fused(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Take the fused path on the CPU too; undone in mid-test for the comparison."""
    monkeypatch.setattr(fused, "serves", lambda query: True)
    return monkeypatch


OPTIONS = {"budget": 14, "interval": 11, "protection": Protection(1, 2)}


def states(traces: list[Trace], recorder: Recorder) -> list[LayerState]:
    """Return what a policy sees of a float32 model at all decisions of a rollout."""
    seen: list[LayerState] = []

    def remember(state: LayerState, order: Tensor, count: Tensor) -> None:
        recorder(state, order, count)
        kept = {name: getattr(state, name).clone() for name in ("stats", "last_attention", "positions")}
        seen.append(LayerState(**(vars(state) | kept)))

    model = kvenv_model(dtype=torch.float32)
    done = rollout(Mixed("stats", "last_attention"), traces, model=model, on_eviction=remember, **OPTIONS)
    assert done.losses.nll.isfinite().all()
    return seen


def test_rollouts_see_the_statistics_of_pytorch(always_fused: pytest.MonkeyPatch) -> None:
    model, traces = kvenv_model(dtype=torch.float32), random_traces([60, 47])
    recorder = Recorder(model, traces)
    ours = states(traces, recorder)
    always_fused.undo()
    theirs = states(traces, Recorder(model, traces))
    assert len(ours) == len(theirs) == 8
    for state, expected in zip(ours, theirs, strict=True):
        assert torch.equal(state.positions, expected.positions)
        filled = state.filled[:, :, None, :]
        for name in ("stats", "last_attention"):
            empty = filled if name == "last_attention" else filled[..., None]
            mine, other = (getattr(x, name) * empty for x in (state, expected))
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    run = masked_run(model, traces[0].tokens, recorder.of(0, traces[0]))
    check_against_plain_loops(ours, run.attention)


def check_against_plain_loops(seen: list[LayerState], attention: list[np.ndarray]) -> None:
    """Compare the statistics of the first row with those of a reference without cache."""
    for state in seen:
        at = int(state.next_position[0])
        spans = windows(at, 25, state.interval)
        for (head, slot), group in ((where, g) for where in np.ndindex(2, 25) for g in range(2)):
            position = int(state.positions[0, head, slot])
            if position >= 0:
                expected = window_statistics(attention[state.layer][head * 2 + group], spans, position)
                assert state.stats[0, head, group, slot].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_golden_utilities_are_those_of_pytorch(reduce: str, always_fused: pytest.MonkeyPatch) -> None:
    model, tokens = kvenv_model(dtype=torch.float32), [trace.tokens for trace in random_traces([53, 40])]
    options = {"interval": 9, "anchors": [15, 16], "reduce": reduce}
    ours, losses, _ = future_attention(model, tokens, **options)
    always_fused.undo()
    theirs, expected, _ = future_attention(model, tokens, **options)
    torch.testing.assert_close(ours.utility, theirs.utility, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.nll, expected.nll, rtol=1e-4, atol=1e-4)
    for layer, attention in enumerate(masked_run(model, tokens[0]).attention):
        for decision, useful in golden_utility(attention, 2, 15, 9, reduce).items():
            positions = torch.arange(decision).expand(2, 2, -1)
            actual = ours.at(layer, positions, torch.tensor([decision, 0]))[0]
            torch.testing.assert_close(actual.double(), torch.as_tensor(useful[:, :decision]), rtol=1e-4, atol=1e-4)
