"""EvictingCache as a Hugging Face cache and under arbitrary evictions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvenv.cache import EvictingCache
from kvenv.decode import collate, feed
from kvenv.layerwise import rollout
from kvenv.ranking import evict, eviction_order
from kvenv.state import Protection
from kvenv.traces import Trace
from tests.models import ARCHITECTURES, random_tokens
from tests.policies import Mixed, Random, Recorder, kvenv_model, random_traces, step_through
from tests.reference import NEVER, copy_with, masked_run


def left_padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (N, S) of random prompts of these lengths."""
    width = max(lengths)
    ids = random_tokens(len(lengths), width)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return ids * mask, mask


@pytest.mark.parametrize("needs", [(), ("stats", "queries", "query_moments")], ids=["bare", "observed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_with_a_big_cache_gives_the_plain_tokens(architecture: str, needs: tuple[str, ...]) -> None:
    model = kvenv_model(architecture)
    ids, mask = left_padded([12, 5, 9])
    cache = EvictingCache(model, rows=3, capacity=40, interval=4, budget=36, needs=needs)
    options = {
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": 14,
        "min_new_tokens": 14,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    ours = model.generate(**options, past_key_values=cache)
    plain = copy_with(model, "sdpa").generate(**options)
    assert torch.equal(ours.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(plain.logits), rtol=0, atol=1e-5)  # float32
    assert cache.get_seq_length() == ours.sequences.shape[1] - 1
    assert torch.equal(cache.next_position, mask.sum(1) + ours.sequences.shape[1] - 13)


def test_generate_goes_on_from_an_evicted_cache() -> None:
    # What generate makes of the cache (inputs it slices off, positions) rests on tokens seen, not on pairs stored.
    model = kvenv_model()
    trace = random_traces([30])[0]
    ids = torch.as_tensor(trace.tokens)[None]
    cache = EvictingCache(model, rows=1, capacity=40, interval=40, budget=12, protection=Protection(1, 2))
    positions = torch.arange(29)[None]
    feed(model, cache, ids[:, :-1], ids[:, 1:], positions, torch.ones_like(positions, dtype=torch.bool))
    evicted = cache.evict(torch.rand(cache.positions.shape), torch.tensor([True]), 40)
    recorder = Recorder(model, random_traces([31]))
    for layer in range(cache.num_layers):
        recorder.note(layer, evicted[layer], torch.tensor([29]))
    assert int((cache.positions >= 0).sum()) == cache.num_layers * 2 * 12
    assert cache.get_seq_length() == 29
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    run = masked_run(model, out.sequences[0].numpy(), recorder.of(0, random_traces([31])[0]))
    loss = -out.logits[0].double().log_softmax(-1)[0, out.sequences[0, -1]]  # generate rounds logits to float32
    torch.testing.assert_close(loss, run.losses[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("needs", [(), ("stats", "last_attention", "queries", "query_moments")], ids=["bare", "all"])
def test_generate_under_a_policy_equals_the_rollout(needs: tuple[str, ...]) -> None:
    model = kvenv_model()
    ids, mask = left_padded([23, 11, 17])
    policy, protection = Mixed(*needs), Protection(1, 2)
    cache = EvictingCache(
        model, rows=3, capacity=13, interval=1, budget=12, needs=policy.needs, protection=protection, policy=policy
    )
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, min_new_tokens=20, max_new_tokens=20, do_sample=False
    )
    traces = [Trace(row[23 - length :].numpy(), 0, (), "") for row, length in zip(out, [23, 11, 17], strict=True)]
    recorder = Recorder(model, traces)
    options = {"budget": 12, "interval": 1, "protection": protection}
    result = rollout(policy, traces, model=model, on_eviction=recorder, **options)
    for row, trace in enumerate(traces):
        lost = recorder.of(row, trace)
        for layer in range(cache.num_layers):
            for head in range(cache.kv_heads):
                kept = (lost[layer, head] == NEVER).nonzero().flatten().tolist()
                assert sorted(p for p in cache.positions[layer, row, head].tolist() if p >= 0) == kept
        assert result.losses.correct[row, len(trace.tokens) - 21 : len(trace.tokens) - 1].sum() >= 19  # but for eos


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(10, 50), min_size=1, max_size=3),
    interval=st.integers(1, 9),
    capacity=st.integers(10, 24),
    seed=st.integers(0, 1000),
    needs=st.sampled_from([(), ("stats",)]),
)
def test_any_evictions_equal_the_masked_full_forward(
    architecture: str, lengths: list[int], interval: int, capacity: int, seed: int, needs: tuple[str, ...]
) -> None:
    # Every head loses another number of pairs at every decision, down to none left.
    model = kvenv_model(architecture)
    traces = random_traces(lengths, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    batch = collate([trace.tokens for trace in traces], anchors=capacity, interval=interval)
    cache = EvictingCache(model, rows=len(traces), capacity=capacity, interval=interval, budget=1, needs=needs)
    recorder = Recorder(model, traces)
    first = capacity + -capacity % interval
    losses = []
    for start in (0, *range(first, batch.tokens.shape[1], interval)):
        stop = start + interval if start else first
        if start:
            filled = cache.positions >= 0
            order = eviction_order(torch.rand(filled.shape, generator=rng), cache.positions, filled)
            least = (filled.sum(-1) - capacity + interval).clamp(min=0)
            count = least + (torch.rand(least.shape, generator=rng) * (filled.sum(-1) - least + 1)).long()
            upcoming = cache.next_position.clone()
            gone = evict(cache.positions, order, count, capacity)
            for layer in range(cache.num_layers):
                recorder.note(layer, gone[layer], upcoming)
        window = [x[:, start:stop] for x in (batch.tokens, batch.targets, batch.positions, batch.valid)]
        losses.append(feed(model, cache, *window).nll)
    by_target = batch.by_position(torch.cat(losses, dim=1), max(lengths) - 1)
    for row, trace in enumerate(traces):
        expected = masked_run(model, trace.tokens, recorder.of(row, trace)).losses
        torch.testing.assert_close(by_target[row, : lengths[row] - 1], expected, rtol=0, atol=1e-9)


@settings(max_examples=8)
@given(budgets=st.tuples(st.integers(8, 20), st.integers(8, 20)), interval=st.integers(1, 8))
def test_rows_may_have_budgets_of_their_own(budgets: tuple[int, int], interval: int) -> None:
    model, traces = kvenv_model(), random_traces([50, 50])
    capacity = max(budgets) + interval
    policy, protection = Mixed("stats"), Protection(2, 3)
    batch = collate([t.tokens for t in traces], anchors=[b + interval for b in budgets], interval=interval)
    cache = EvictingCache(
        model,
        rows=2,
        capacity=capacity,
        interval=interval,
        budget=torch.tensor(budgets),
        needs=policy.needs,
        protection=protection,
    )
    cache.rollout.zero_()
    losses = []
    first = capacity + -capacity % interval
    for start in (0, *range(first, batch.tokens.shape[1], interval)):
        stop = start + interval if start else first
        if start:
            active = batch.valid[:, start:stop].any(1)
            cache.evict(torch.stack([policy(cache.layer_state(layer)) for layer in range(2)]), active, interval)
            held = (cache.positions >= 0).sum(-1)
            assert (held == torch.tensor(budgets)[:, None])[:, active].all()
        window = [x[:, start:stop] for x in (batch.tokens, batch.targets, batch.positions, batch.valid)]
        losses.append(feed(model, cache, *window).nll)
    by_target = batch.by_position(torch.cat(losses, dim=1), 49)
    for row, budget in enumerate(budgets):
        options = {"budget": budget, "interval": interval, "protection": protection}
        alone, _, _ = step_through(policy, [traces[row]], model=model, **options)
        torch.testing.assert_close(by_target[row : row + 1], alone, rtol=0, atol=1e-9)


def test_storage_never_moves() -> None:
    model = kvenv_model()
    pointers: list[dict[str, int]] = []

    def remember(cache: EvictingCache) -> None:
        pointers.append({name: x.data_ptr() for name, (x, _) in cache.row_tensors().items()})

    policy = Mixed("stats", "last_attention", "queries", "query_moments")
    step_through(
        policy,
        random_traces([60, 50]),
        model=model,
        budget=12,
        interval=5,
        protection=Protection(1, 2),
        between=remember,
    )
    assert len(pointers) > 5
    kept = {"keys", "values", "positions", "stats", "last_attention", "queries", "query_first", "query_second"}
    assert kept <= set(pointers[0])
    assert all({name: p[name] for name in kept} == {name: pointers[0][name] for name in kept} for p in pointers)


def test_keys_keep_the_phase_of_their_position() -> None:
    model, traces = kvenv_model(), random_traces([60])
    _, recorder, cache = step_through(Random(), traces, model=model, budget=12, interval=5, protection=Protection(1, 2))
    run = masked_run(model, traces[0].tokens, recorder.of(0, traces[0]))
    for layer in range(cache.num_layers):
        for head in range(cache.kv_heads):
            for slot, position in enumerate(cache.positions[layer, 0, head].tolist()):
                if position >= 0:
                    expected = run.keys[layer][head, position], run.values[layer][head, position]
                    actual = cache.keys[layer, 0, head, slot], cache.values[layer, 0, head, slot]
                    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_copied_rows_go_on_as_their_source() -> None:
    model, traces = kvenv_model(), random_traces([40, 40, 40])
    policy = Mixed("stats", "last_attention", "queries", "query_moments")
    options = {"model": model, "budget": 12, "interval": 5, "protection": Protection(1, 2)}
    expected = [step_through(policy, [trace], **options)[0] for trace in traces]

    def overwrite(cache: EvictingCache) -> None:
        other = EvictingCache(model, rows=3, capacity=17, interval=5, budget=12, needs=policy.needs)
        other.copy_rows(torch.tensor([2, 0]), cache)  # cache has rows 0 and 1
        cache.copy_rows(torch.tensor([0, 1]), rows_of(other, [2, 0], model, policy))

    losses, _, _ = step_through(policy, [traces[0], traces[1]], between=overwrite, **options)
    plain, _, _ = step_through(policy, [traces[0], traces[1]], **options)
    assert torch.equal(losses, plain)
    torch.testing.assert_close(plain[:1], expected[0], rtol=0, atol=1e-9)


def rows_of(cache: EvictingCache, rows: list[int], model: object, policy: Mixed) -> EvictingCache:
    """Return a cache of these rows of another."""
    part = EvictingCache(model, rows=len(rows), capacity=17, interval=5, budget=12, needs=policy.needs)
    for name, (target, axis) in part.row_tensors().items():
        target.copy_(cache.row_tensors()[name][0].index_select(axis, torch.tensor(rows)))
    return part


def test_misuse_is_refused() -> None:
    model = kvenv_model()
    with pytest.raises(ValueError, match=r"unknown \['colour'\].*noise"):
        EvictingCache(model, rows=1, capacity=8, interval=4, budget=4, needs={"colour"})
    with pytest.raises(ValueError, match=r"budget 12 is less than the 20 protected pairs \(sinks 4, recent 16\)"):
        EvictingCache(model, rows=1, capacity=13, interval=1, budget=12, policy=Random())
    ids, mask = left_padded([12])
    small = EvictingCache(model, rows=1, capacity=16, interval=4, budget=12)
    with pytest.raises(ValueError, match="capacity 16 is full after 16 tokens"):
        model.generate(ids, attention_mask=mask, past_key_values=small, min_new_tokens=9, max_new_tokens=9)
    wide = EvictingCache(
        model, rows=1, capacity=16, interval=4, budget=12, policy=Random(), protection=Protection(1, 2)
    )
    assert wide.needs == {"noise"}
    with pytest.raises(ValueError, match="interval=1, not 4"):
        model.generate(ids, attention_mask=mask, past_key_values=wide, max_new_tokens=4)
    tight = EvictingCache(model, rows=1, capacity=8, interval=1, budget=8, policy=Random(), protection=Protection(1, 2))
    with pytest.raises(ValueError, match="capacity 8 leaves no slot for a new token"):
        model.generate(ids, attention_mask=mask, past_key_values=tight, max_new_tokens=4)
    beams = EvictingCache(model, rows=2, capacity=40, interval=4, budget=36)
    with pytest.raises(ValueError, match="beam search"):
        model.generate(ids, attention_mask=mask, past_key_values=beams, num_beams=2, max_new_tokens=4, do_sample=False)
    assisted = EvictingCache(model, rows=1, capacity=40, interval=4, budget=36)
    with pytest.raises(ValueError, match="assisted decoding"):
        model.generate(
            ids,
            attention_mask=mask,
            past_key_values=assisted,
            prompt_lookup_num_tokens=2,
            min_new_tokens=9,
            max_new_tokens=9,
        )
    wrong_rows = EvictingCache(model, rows=2, capacity=40, interval=4, budget=36)
    with pytest.raises(ValueError, match="2 rows"):
        model.generate(ids, attention_mask=mask, past_key_values=wrong_rows, max_new_tokens=4, do_sample=False)


def test_rows_of_a_smaller_cache_leave_the_other_slots_empty() -> None:
    model = kvenv_model()
    caches = [EvictingCache(model, rows=2, capacity=capacity, interval=4, budget=4) for capacity in (12, 8)]
    batch = collate([trace.tokens for trace in random_traces([13, 13])])
    wide, small = caches
    for cache, columns in ((wide, 12), (small, 8)):
        fed = (x[:, :columns] for x in (batch.tokens, batch.targets, batch.positions, batch.valid))
        feed(model, cache, *fed)
    wide.copy_rows(torch.tensor([1, 0]), small)
    assert (wide.positions[..., 8:] == -1).all()
    assert torch.equal(wide.positions[..., :8], small.positions[:, [1, 0]])
    assert torch.equal(wide.keys[..., :8, :], small.keys[:, [1, 0]])
