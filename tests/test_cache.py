"""The slots under arbitrary evictions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvenv.cache import SlotCache
from kvenv.decode import collate, feed
from kvenv.ranking import evict, eviction_order
from kvenv.state import Protection
from tests.models import ARCHITECTURES, random_tokens
from tests.policies import Mixed, Random, Recorder, kvenv_model, random_traces, step_through
from tests.reference import masked_run


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
    cache = SlotCache(model, rows=len(traces), capacity=capacity, interval=interval, budget=1, needs=needs)
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
    cache = SlotCache(
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

    def remember(cache: SlotCache) -> None:
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
    kept = {"positions", "stats", "last_attention", "query_first", "query_second"}
    kept |= {f"{name}.{layer}" for name in ("keys", "values", "queries") for layer in range(2)}
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
                    actual = cache.keys[layer][0, head, slot], cache.values[layer][0, head, slot]
                    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_copied_rows_go_on_as_their_source() -> None:
    model, traces = kvenv_model(), random_traces([40, 40, 40])
    policy = Mixed("stats", "last_attention", "queries", "query_moments")
    options = {"model": model, "budget": 12, "interval": 5, "protection": Protection(1, 2)}
    expected = [step_through(policy, [trace], **options)[0] for trace in traces]

    def overwrite(cache: SlotCache) -> None:
        other = SlotCache(model, rows=3, capacity=17, interval=5, budget=12, needs=policy.needs)
        other.copy_rows(torch.tensor([2, 0]), cache)  # cache has rows 0 and 1
        cache.copy_rows(torch.tensor([0, 1]), rows_of(other, [2, 0], model, policy))

    losses, _, _ = step_through(policy, [traces[0], traces[1]], between=overwrite, **options)
    plain, _, _ = step_through(policy, [traces[0], traces[1]], **options)
    assert torch.equal(losses, plain)
    torch.testing.assert_close(plain[:1], expected[0], rtol=0, atol=1e-9)


def rows_of(cache: SlotCache, rows: list[int], model: object, policy: Mixed) -> SlotCache:
    """Return a cache of these rows of another."""
    part = SlotCache(model, rows=len(rows), capacity=17, interval=5, budget=12, needs=policy.needs)
    for name, (target, axis) in part.row_tensors().items():
        target.copy_(cache.row_tensors()[name][0].index_select(axis, torch.tensor(rows)))
    return part


def test_misuse_is_refused() -> None:
    model = kvenv_model()
    with pytest.raises(ValueError, match=r"unknown \['colour'\].*noise"):
        SlotCache(model, rows=1, capacity=8, interval=4, budget=4, needs={"colour"})
    with pytest.raises(ValueError, match=r"budget 12 is less than the 20 protected pairs \(sinks 4, recent 16\)"):
        SlotCache(model, rows=1, capacity=13, interval=1, budget=12, policy=Random())
    cache = SlotCache(model, rows=2, capacity=40, interval=4, budget=36)
    with pytest.raises(ValueError, match=r"take a kvenv\.EvictingCache"):
        model(random_tokens(2, 5), past_key_values=cache)
    batch = collate([trace.tokens for trace in random_traces([13])])
    with pytest.raises(ValueError, match="the cache has 2 rows, not the batch's 1"):
        feed(model, cache, batch.tokens, batch.targets, batch.positions, batch.valid)


def test_rows_of_a_smaller_cache_leave_the_other_slots_empty() -> None:
    model = kvenv_model()
    caches = [SlotCache(model, rows=2, capacity=capacity, interval=4, budget=4) for capacity in (12, 8)]
    batch = collate([trace.tokens for trace in random_traces([13, 13])])
    wide, small = caches
    for cache, columns in ((wide, 12), (small, 8)):
        fed = (x[:, :columns] for x in (batch.tokens, batch.targets, batch.positions, batch.valid))
        feed(model, cache, *fed)
    wide.copy_rows(torch.tensor([1, 0]), small)
    assert (wide.positions[..., 8:] == -1).all()
    assert torch.equal(wide.positions[..., :8], small.positions[:, [1, 0]])
    for held, source in zip(wide.keys, small.keys, strict=True):
        assert torch.equal(held[..., :8, :], source[[1, 0]])
