"""The invariants of a decode: full budget, masked reference, batches, slots, stepping, kept sets, interleaving."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from kvenv import layerwise
from kvenv.cache import SlotCache
from kvenv.golden import future_attention
from kvenv.layerwise import check_budget, rollout
from kvenv.state import LayerState, Protection
from tests.models import ARCHITECTURES, random_model
from tests.policies import Mixed, Random, Recorder, kvenv_model, random_traces, step_through
from tests.reference import NEVER, keep, masked_run, plain_losses

SHAPES = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(3, 60), min_size=1, max_size=3),
        "budget": st.integers(6, 24),
        "interval": st.integers(1, 9),
        "protection": st.builds(Protection, sinks=st.integers(0, 3), recent=st.integers(0, 3)),
        "seed": st.integers(0, 1000),
    }
)


def losses_of(result, row: int, trace) -> torch.Tensor:
    return result.losses.nll[row, : len(trace.tokens) - 1]


@pytest.mark.parametrize("needs", [(), ("stats",)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_full_budget_gives_the_plain_losses(architecture: str, needs: tuple[str, ...]) -> None:
    model = kvenv_model(architecture)
    traces = random_traces([50, 21, 37])
    result = rollout(Mixed(*needs), traces, model=model, budget=49, interval=8)
    for row, trace in enumerate(traces):
        torch.testing.assert_close(losses_of(result, row, trace), plain_losses(model, trace.tokens), rtol=0, atol=1e-9)
    assert not result.losses.nll[1, 20:].any(), "losses beyond the end of a trace"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=8)
@given(shape=SHAPES, needs=st.sampled_from([(), ("stats",)]))
def test_losses_equal_a_full_forward_that_masks_the_evicted(architecture: str, shape: dict, needs: tuple) -> None:
    model = kvenv_model(architecture)
    traces = random_traces(shape.pop("lengths"), seed=shape["seed"])
    recorder = Recorder(model, traces)
    result = rollout(Mixed(*needs), traces, model=model, on_eviction=recorder, **shape)
    for row, trace in enumerate(traces):
        expected = masked_run(model, trace.tokens, recorder.of(row, trace)).losses
        torch.testing.assert_close(losses_of(result, row, trace), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_agrees_with_its_masked_reference(architecture: str) -> None:
    model = kvenv_model(architecture, torch.float32)
    traces = random_traces([70, 45])
    recorder = Recorder(model, traces)
    result = rollout(Random(), traces, model=model, budget=20, interval=8, on_eviction=recorder)
    for row, trace in enumerate(traces):
        expected = masked_run(model, trace.tokens, recorder.of(row, trace)).losses
        torch.testing.assert_close(losses_of(result, row, trace), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_more_evicted_pair_shows(architecture: str) -> None:
    # Something in the model that rounds away small differences would make the tolerance of 1e-9 blind.
    model = kvenv_model(architecture)
    trace = random_traces([40])[0]
    lost_at = torch.full((model.config.num_hidden_layers, 2, 39), NEVER)
    lost_at[:, :, 5:9] = 20
    once = masked_run(model, trace.tokens, lost_at).losses
    lost_at[1, 0, 9] = 20
    twice = masked_run(model, trace.tokens, lost_at).losses
    assert (once - twice)[20:].abs().max() > 1e-4
    assert torch.equal(once[:20], twice[:20])


@pytest.mark.parametrize("needs", [(), ("stats", "last_attention")], ids=["fused", "observed"])
def test_bfloat16_stays_near_its_reference(needs: tuple[str, ...]) -> None:
    model = kvenv_model("qwen3", torch.bfloat16)
    traces = random_traces([70, 45])
    recorder = Recorder(model, traces)
    result = rollout(Mixed(*needs), traces, model=model, budget=20, interval=8, on_eviction=recorder)
    for row, trace in enumerate(traces):
        expected = masked_run(model, trace.tokens, recorder.of(row, trace)).losses
        assert (losses_of(result, row, trace) - expected).abs().mean() < 0.05
        assert (plain_losses(model, trace.tokens) - expected).abs().mean() > 0.2, "eviction must show"


@settings(max_examples=15)
@given(shape=SHAPES, needs=st.sampled_from([(), ("stats",), ("queries", "query_moments"), ("last_attention",)]))
def test_a_row_of_a_batch_equals_the_trace_alone(shape: dict, needs: tuple[str, ...]) -> None:
    model = kvenv_model()
    traces = random_traces(shape.pop("lengths"), seed=shape["seed"])
    together = Recorder(model, traces)
    result = rollout(Mixed(*needs), traces, model=model, on_eviction=together, **shape)
    for row, trace in enumerate(traces):
        alone = Recorder(model, [trace])
        single = rollout(Mixed(*needs), [trace], model=model, rollouts=[row], on_eviction=alone, **shape)
        assert torch.equal(alone.of(0, trace), together.of(row, trace))
        torch.testing.assert_close(losses_of(single, 0, trace), losses_of(result, row, trace), rtol=0, atol=1e-9)


NEEDS = [
    (),
    ("stats",),
    ("last_attention",),
    ("queries",),
    ("query_moments",),
    ("future",),
    ("stats", "last_attention", "queries", "query_moments", "future"),
]


@pytest.mark.parametrize("needs", NEEDS, ids="+".join)
@settings(max_examples=6)
@given(shape=SHAPES)
def test_stepping_equals_the_layer_by_layer_rollout(shape: dict, needs: tuple[str, ...]) -> None:
    model = kvenv_model()
    traces = random_traces(shape.pop("lengths"), seed=shape["seed"])
    future, _, _ = future_attention(
        model,
        [trace.tokens for trace in traces],
        interval=shape["interval"],
        anchors=shape["budget"] + shape["interval"],
    )
    recorder = Recorder(model, traces)
    result = rollout(Mixed(*needs), traces, model=model, future=future, on_eviction=recorder, **shape)
    losses, stepped, _ = step_through(Mixed(*needs), traces, model=model, future=future, **shape)
    assert torch.equal(stepped.lost_at, recorder.lost_at)
    torch.testing.assert_close(losses, result.losses.nll, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", ["periodic", "prefill"])
@settings(max_examples=8)
@given(shape=SHAPES, needs=st.sampled_from([(), ("stats", "queries", "query_moments")]), at_once=st.integers(1, 60))
def test_the_parts_that_a_rollout_is_fed_in_change_nothing(
    schedule: str, shape: dict, needs: tuple[str, ...], at_once: int
) -> None:
    model = kvenv_model()
    traces = random_traces(shape.pop("lengths"), seed=shape["seed"])
    # What is to be evicted from is longer than the budget, where the trace is.
    traces = [replace(trace, prompt_length=max(1, len(trace.tokens) - 2)) for trace in traces]
    shape |= {"schedule": schedule, "model": model}
    with pytest.MonkeyPatch.context() as patch:
        recorders = whole, parted = Recorder(model, traces), Recorder(model, traces)
        results = []
        for recorder, tokens in zip(recorders, (10**6, at_once), strict=True):
            patch.setattr(layerwise, "TOKENS_AT_ONCE", {"cpu": tokens})
            results.append(rollout(Mixed(*needs), traces, on_eviction=recorder, **shape))
    torch.testing.assert_close(results[0].losses.nll, results[1].losses.nll, rtol=0, atol=1e-9)
    for row, trace in enumerate(traces):
        assert torch.equal(whole.of(row, trace), parted.of(row, trace))


def test_the_seed_decides() -> None:
    model, traces = kvenv_model(), random_traces([60, 60])
    runs = []
    for seed in (3, 3, 4):
        recorder = Recorder(model, traces)
        rollout(Random(), traces, model=model, budget=20, interval=8, seed=seed, on_eviction=recorder)
        runs.append(recorder.lost_at)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][:, 0], runs[0][:, 1]), "rows are different rollouts"


def shuffle_slots(cache: SlotCache) -> None:
    """Permute the slots of every head of a live cache."""
    slots = torch.rand(cache.positions.shape).argsort(dim=-1)
    cache.positions.copy_(cache.positions.gather(-1, slots))
    for layers in (cache.keys, cache.values):
        for pairs, order in zip(layers, slots, strict=True):
            pairs.copy_(pairs.gather(2, order[..., None].expand_as(pairs)))
    if cache.statistics is not None:
        for x in (cache.statistics.values, cache.statistics.last):
            where = slots.view(*slots.shape[:3], *[1] * (x.dim() - 4), -1).expand_as(x)
            x.copy_(x.gather(-1, where))


@settings(max_examples=10)
@given(shape=SHAPES)
def test_permuting_slots_changes_nothing(shape: dict) -> None:
    model = kvenv_model()
    traces = random_traces(shape.pop("lengths"), seed=shape["seed"])
    policy = Mixed("stats", "last_attention", "queries", "query_moments")
    losses, recorder, _ = step_through(policy, traces, model=model, **shape)
    shuffled_losses, shuffled, _ = step_through(policy, traces, model=model, between=shuffle_slots, **shape)
    assert torch.equal(shuffled.lost_at, recorder.lost_at)
    torch.testing.assert_close(shuffled_losses, losses, rtol=0, atol=1e-9)


class Coarse(Random):
    """Few different priorities, infinities among them: ties everywhere."""

    def __call__(self, state: LayerState) -> torch.Tensor:
        """Return one of four values."""
        return torch.tensor([-torch.inf, 0.0, 1.0, torch.inf])[(state.noise * 4).long()]


@settings(max_examples=15)
@given(shape=SHAPES, policy=st.sampled_from([Random(), Coarse()]))
def test_the_top_ranked_and_the_protected_are_kept(shape: dict, policy: Random) -> None:
    model = kvenv_model()
    traces = random_traces(shape.pop("lengths"), seed=shape["seed"])
    expected: list[set[int]] = []
    held: dict[tuple[int, int, int], set[int]] = {}
    budget, protection = shape["budget"], shape["protection"]

    def check(state: LayerState, order: torch.Tensor, count: torch.Tensor) -> None:
        priorities = policy(state)
        for row in range(len(traces)):
            upcoming = int(state.next_position[row])
            for head in range(2):
                before = held.get((state.layer, row, head))
                slots = {int(p): c for c, p in enumerate(state.positions[row, head]) if p >= 0}
                if before is not None:
                    fed = set(range(upcoming - shape["interval"], upcoming))
                    assert upcoming >= len(traces[row].tokens) or set(slots) == before | fed
                protected = {p for p in slots if p < protection.sinks or p >= upcoming - protection.recent}
                gone = {int(state.positions[row, head, slot]) for slot in order[row, head, : count[row, head]]}
                if upcoming >= len(traces[row].tokens) - 1:
                    assert not gone, "a finished row evicts nothing"
                    continue
                candidates = {p: float(priorities[row, head, c]) for p, c in slots.items() if p not in protected}
                assert {p for p, c in slots.items() if state.mask[row, head, c]} == set(candidates)
                stay = keep(candidates, protected, budget)
                assert set(slots) - gone == stay
                assert len(stay) == budget
                held[state.layer, row, head] = stay
                expected.append(stay)

    rollout(policy, traces, model=model, on_eviction=check, **shape)
    assert bool(expected) == any(len(trace.tokens) - 1 > budget + shape["interval"] for trace in traces)


def test_the_prompt_can_be_protected() -> None:
    model, traces = kvenv_model(), random_traces([60, 50])
    traces = [type(t)(t.tokens, prompt, (), t.name) for t, prompt in zip(traces, (12, 3), strict=True)]
    recorder = Recorder(model, traces)
    protection = Protection(sinks=2, recent=4, prompt=True)
    rollout(Random(), traces, model=model, budget=20, interval=6, protection=protection, on_eviction=recorder)
    assert (recorder.lost_at[:, 0, :, :12] == NEVER).all()
    assert (recorder.lost_at[:, 1, :, :3] == NEVER).all()
    assert (recorder.lost_at[:, 1, :, 3:12] < NEVER).any()


def test_prefill_evicts_once_at_the_end_of_each_prompt() -> None:
    model, traces = kvenv_model(), random_traces([60, 50])
    traces = [type(t)(t.tokens, prompt, (), t.name) for t, prompt in zip(traces, (31, 25), strict=True)]
    recorder = Recorder(model, traces)
    options = {"model": model, "budget": 12, "interval": 7, "schedule": "prefill"}
    result = rollout(Mixed("stats", "queries"), traces, on_eviction=recorder, **options)
    for row, trace in enumerate(traces):
        lost = recorder.of(row, trace)
        assert set(lost.unique().tolist()) == {trace.prompt_length, NEVER}
        assert ((lost < NEVER).sum(-1) == trace.prompt_length - 12).all()
        expected = masked_run(model, trace.tokens, lost).losses
        torch.testing.assert_close(losses_of(result, row, trace), expected, rtol=0, atol=1e-9)
        alone = rollout(Mixed("stats", "queries"), [trace], rollouts=[row], **options)
        torch.testing.assert_close(losses_of(alone, 0, trace), losses_of(result, row, trace), rtol=0, atol=1e-9)


class Golden:
    """Keeps what will be attended to."""

    name, needs = "golden", frozenset({"future"})

    def __call__(self, state: LayerState) -> torch.Tensor:
        """Return the future."""
        return state.future


def test_agreement_counts_what_golden_would_have_evicted() -> None:
    model, traces = kvenv_model(), random_traces([60, 43])
    tokens = [trace.tokens for trace in traces]
    future, _, _ = future_attention(model, tokens, interval=6, anchors=20)
    options = {"model": model, "budget": 14, "interval": 6, "protection": Protection(2, 3), "future": future}
    assert torch.equal(rollout(Golden(), traces, agreement=True, **options).agreement, torch.ones(2))

    shared = torch.zeros(2)
    evicted = torch.zeros(2)

    def count_by_hand(state: LayerState, order: torch.Tensor, count: torch.Tensor) -> None:
        for row, head in ((row, head) for row in range(2) for head in range(2)):
            number = int(count[row, head])
            useful = {
                int(state.positions[row, head, c]): float(state.future[row, head, c])
                for c in range(order.shape[-1])
                if state.mask[row, head, c]
            }
            golden = sorted(useful, key=lambda position: (useful[position], position))[:number]
            gone = {int(state.positions[row, head, slot]) for slot in order[row, head, :number]}
            shared[row] += len(gone & set(golden))
            evicted[row] += number

    agreement = rollout(Random(), traces, agreement=True, on_eviction=count_by_hand, **options).agreement
    torch.testing.assert_close(agreement, shared / evicted)
    assert (agreement < 0.9).all()


def test_two_runs_a_golden_pass_and_generate_share_one_model() -> None:
    model, traces = kvenv_model(), random_traces([50, 41])
    ids = torch.as_tensor(traces[0].tokens[None, :10])

    def golden() -> torch.Tensor:
        return future_attention(model, [trace.tokens for trace in traces], interval=6, anchors=18)[0].utility

    def generated() -> torch.Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)

    options = {"model": model, "budget": 12, "interval": 6, "protection": Protection(2, 3)}
    quiet_losses, quiet, _ = step_through(Mixed("stats"), traces, **options)
    quiet_golden, quiet_generated = golden(), generated()
    plain = rollout(Random(), traces, **options).losses.nll

    def disturb(cache: SlotCache) -> None:
        assert torch.equal(generated(), quiet_generated)
        assert torch.equal(golden(), quiet_golden)
        assert torch.equal(rollout(Random(), traces, **options).losses.nll, plain)

    losses, recorder, _ = step_through(Mixed("stats"), traces, between=disturb, **options)
    assert torch.equal(losses, quiet_losses)
    assert torch.equal(recorder.lost_at, quiet.lost_at)


def on_sdpa() -> PreTrainedModel:
    """Return a model of one's own that nobody has switched to kvenv's attention."""
    model = copy.deepcopy(random_model())
    model.set_attn_implementation("sdpa")
    return model


def test_impossible_settings_are_refused() -> None:
    model, traces = kvenv_model(), random_traces([50])
    with pytest.raises(ValueError, match="budget 0"):
        check_budget(0, Protection(0, 0), traces[0], 4)
    with pytest.raises(ValueError, match="interval 0"):
        rollout(Random(), traces, model=model, budget=10, interval=0)
    with pytest.raises(ValueError, match="budget 9 is less than the 10 protected"):
        rollout(Random(), traces, model=model, budget=9, interval=4, protection=Protection(4, 6))
    with pytest.raises(ValueError, match="needs future"):
        rollout(Golden(), traces, model=model, budget=20, interval=4)
    with pytest.raises(ValueError, match="pass future="):
        rollout(Random(), traces, model=model, budget=20, interval=4, agreement=True)
    with pytest.raises(ValueError, match="has no prompt"):
        rollout(Random(), traces, model=model, budget=20, interval=4, schedule="prefill")
    with pytest.raises(ValueError, match="traces are none"):
        rollout(Random(), [], model=model, budget=20, interval=4)
    with pytest.raises(ValueError, match="trace_length 2049 exceeds the 2048 positions of model 'Qwen3"):
        rollout(Random(), random_traces([50, 2049]), model=model, budget=20, interval=4)
    with pytest.raises(ValueError, match="model Qwen3ForCausalLM is on attention 'sdpa', which knows no eviction"):
        rollout(Random(), traces, model=on_sdpa(), budget=20, interval=4)


def test_by_default_the_newest_window_is_protected() -> None:
    model, traces = kvenv_model(), random_traces([50])
    recorder = Recorder(model, traces)
    rollout(Random(), traces, model=model, budget=20, interval=5, on_eviction=recorder)
    lost = recorder.of(0, traces[0])
    assert (lost[..., :4] == NEVER).all()
    ages = (lost - torch.arange(lost.shape[-1]))[lost < NEVER]
    assert ages.min() > 5
    assert ages.min() == 6
