"""EvictingCache in generate: plain text under a big budget, the rollout's evictions under a small one."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CompileConfig, PreTrainedModel, TextStreamer

import agents
import kvenv
from kvenv.attention import use_kvenv_attention
from kvenv.layerwise import rollout
from kvenv.state import Protection
from kvenv.traces import Trace
from tests.models import ARCHITECTURES, random_model, random_tokens
from tests.policies import Mixed, Random, Recorder, kvenv_model
from tests.reference import NEVER, copy_with

PROTECTION = Protection(1, 2)
NEVER_SAID = 10**6
"""An EOS that no vocabulary has."""
NEEDS = [(), ("stats",), ("last_attention",), ("queries",), ("query_moments",)]


def left_padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (N, S) of random prompts of these lengths."""
    width = max(lengths)
    ids = random_tokens(len(lengths), width)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return ids * mask, mask


def generate(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: object, new: int = 20, **options: object
) -> torch.Tensor:
    """Return what is generated, prompts included: exactly ``new`` tokens."""
    fixed = {"max_new_tokens": new, "eos_token_id": NEVER_SAID, "pad_token_id": 0, "do_sample": False}
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **{**fixed, **options})


def check_kept(
    cache: kvenv.EvictingCache, out: torch.Tensor, lengths: list[int], model: PreTrainedModel, **terms
) -> None:
    """Compare what a cache holds with what a rollout of the same text keeps."""
    width = max(lengths)
    traces = [Trace(row[width - n :].numpy(), n, (), "") for row, n in zip(out, lengths, strict=True)]
    recorder = Recorder(model, traces)
    result = rollout(cache.policy, traces, model=model, on_eviction=recorder, protection=PROTECTION, **terms)
    for row, trace in enumerate(traces):
        lost = recorder.of(row, trace)
        for layer, head in np.ndindex(*lost.shape[:2]):
            kept = (lost[layer, head] == NEVER).nonzero().flatten().tolist()
            assert sorted(p for p in cache.positions[layer, row, head].tolist() if p >= 0) == kept
        told = result.losses.correct[row, lengths[row] - 1 : len(trace.tokens) - 1]
        assert told.all(), "greedy tokens are the rollout's most likely"


@pytest.mark.parametrize("needs", [(), ("stats", "queries", "query_moments")], ids=["bare", "observed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_big_budget_gives_the_plain_tokens(architecture: str, needs: tuple[str, ...]) -> None:
    model = kvenv_model(architecture)
    ids, mask = left_padded([12, 5, 9])
    cache = kvenv.EvictingCache(model, Mixed(*needs), budget=36, interval=4, protection=PROTECTION)
    told = {"output_logits": True, "return_dict_in_generate": True}
    ours = generate(model, ids, mask, cache, 14, **told)
    plain = generate(copy_with(model, "sdpa"), ids, mask, None, 14, **told)
    assert torch.equal(ours.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(plain.logits), rtol=0, atol=1e-5)  # float32
    assert cache.get_seq_length() == ours.sequences.shape[1] - 1


@pytest.mark.parametrize("needs", [*NEEDS, tuple(need for needs in NEEDS for need in needs)], ids="+".join)
@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    budget=st.integers(4, 14),
    interval=st.integers(1, 9),
    schedule=st.sampled_from(["periodic", "prefill"]),
)
def test_what_is_kept_is_what_a_rollout_keeps(
    needs: tuple[str, ...], lengths: list[int], budget: int, interval: int, schedule: str
) -> None:
    model = kvenv_model()
    ids, mask = left_padded(lengths)
    terms = {"budget": budget, "interval": interval, "schedule": schedule}
    cache = kvenv.EvictingCache(model, Mixed(*needs), protection=PROTECTION, **terms)
    check_kept(cache, generate(model, ids, mask, cache), lengths, model, **terms)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_every_architecture(architecture: str) -> None:
    model, lengths = kvenv_model(architecture), [31, 7]
    ids, mask = left_padded(lengths)
    terms = {"budget": 10, "interval": 4}
    cache = kvenv.EvictingCache(model, Mixed("stats"), protection=PROTECTION, **terms)
    check_kept(cache, generate(model, ids, mask, cache), lengths, model, **terms)


@pytest.mark.parametrize("schedule", ["periodic", "prefill"])
@pytest.mark.parametrize("name", [name for name in agents.names(trained=False) if "golden" not in name])
def test_every_heuristic_and_padding_changes_nothing(name: str, schedule: str) -> None:
    if "noise" in agents.make(name).needs or name == "knorm":
        pytest.skip("noise depends on the row; of equal tokens' norms, rounding says which is larger")
    model, lengths = kvenv_model(dtype=torch.float32), [40, 25, 33]
    ids, mask = left_padded(lengths)

    def cache() -> kvenv.EvictingCache:
        policy = agents.make(name)
        return kvenv.EvictingCache(model, policy, budget=20, interval=6, schedule=schedule, protection=PROTECTION)

    together = generate(model, ids, mask, cache())
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, -length:], mask[row : row + 1, -length:], cache())
        assert torch.equal(together[row, -20:], alone[0, -20:])


@pytest.mark.parametrize("name", ["imitation-tiny", "kvp-tiny"])
def test_trained_policies_keep_what_they_keep_in_rollouts(name: str, tiny_model) -> None:
    traces = kvenv.load_traces("recall", split="test", tokenizer=tiny_model.tokenizer, trace_length=160)
    ids = torch.as_tensor(np.stack([traces[i].tokens for i in range(2)]))
    terms = {"budget": 48, "interval": 16}
    cache = kvenv.EvictingCache(tiny_model.model, agents.make(name), protection=PROTECTION, **terms)
    out = generate(tiny_model.model, ids, torch.ones_like(ids), cache)
    check_kept(cache, out, [160, 160], tiny_model.model, **terms)


@pytest.mark.parametrize("needs", [(), ("stats", "query_moments")], ids=["bare", "observed"])
def test_a_conversation_goes_on_in_the_same_cache(needs: tuple[str, ...]) -> None:
    model, terms = kvenv_model(), {"budget": 10, "interval": 4}
    cache = kvenv.EvictingCache(model, Mixed(*needs), protection=PROTECTION, **terms)
    first = generate(model, *left_padded([9, 9]), cache)
    told = torch.cat([first, random_tokens(2, 15)], dim=1)
    out = generate(model, told, torch.ones_like(told), cache)
    width = told.shape[1]
    traces = [Trace(row.numpy(), 0, (), "") for row in out]
    recorder = Recorder(model, traces)
    rollout(cache.policy, traces, model=model, on_eviction=recorder, protection=PROTECTION, **terms)
    for row, trace in enumerate(traces):
        kept = (recorder.of(row, trace)[1, 0] == NEVER).nonzero().flatten().tolist()
        assert sorted(p for p in cache.positions[1, row, 0].tolist() if p >= 0) == kept
    assert out.shape[1] == width + 20


def test_slots_are_made_as_they_are_needed_and_given_back() -> None:
    model = kvenv_model()
    ids, mask = left_padded([40])
    small = kvenv.EvictingCache(model, Random(), budget=10, interval=4, protection=PROTECTION)
    assert small.nbytes == 0
    generate(model, ids, mask, small)
    assert small.positions.shape[-1] == 14
    assert small.nbytes == 2 * 8 * small.positions.numel() * small.head_dim
    grown = kvenv.EvictingCache(model, Random(), budget=10_000, interval=4, protection=PROTECTION)
    generate(model, ids, mask, grown, 400)
    assert 439 <= grown.positions.shape[-1] < 1000
    ids, mask = left_padded([700])
    shrunk = kvenv.EvictingCache(
        model, Mixed("stats"), budget=10, interval=4, schedule="prefill", protection=PROTECTION
    )
    generate(model, ids, mask, shrunk, 3)
    assert shrunk.positions.shape[-1] < 300


def compiled(**options: object) -> CompileConfig:
    """Return how generate compiles on any device, as it does by itself on accelerators."""
    config = CompileConfig(fullgraph=True, mode=None, **options)
    config._compile_all_devices = True
    return config


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start from nothing compiled, and undo what compiling does to all the process."""
    torch.compiler.reset()
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("schedule", ["periodic", "prefill"])
@pytest.mark.parametrize("needs", [(), ("stats", "query_moments")], ids=["bare", "observed"])
def test_tokens_are_decoded_in_one_graph(needs: tuple[str, ...], schedule: str) -> None:
    model, lengths = random_model("qwen3"), [31, 7]
    ids, mask = left_padded(lengths)
    terms = {"budget": 10, "interval": 4, "schedule": schedule}
    made: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        made.append(graph)
        return graph.forward

    use_kvenv_attention(model)
    for _ in range(2):  # a second cache needs no graph of its own
        cache = kvenv.EvictingCache(model, Mixed(*needs), protection=PROTECTION, compileable=True, **terms)
        out = generate(model, ids, mask, cache, compile_config=compiled(backend=count, dynamic=False))
        check_kept(cache, out, lengths, model, **terms)
        assert cache.get_seq_length() == out.shape[1] - 1
    assert len(made) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
def test_compiled_tokens_are_the_same(tiny_model) -> None:
    traces = kvenv.load_traces("recall", split="test", tokenizer=tiny_model.tokenizer, trace_length=120)
    ids = torch.as_tensor(np.stack([traces[i].tokens for i in range(2)]))
    told = []
    for options in ({}, {"compile_config": compiled(dynamic=False)}):
        terms = {"budget": 48, "interval": 16, "compileable": bool(options)}
        cache = kvenv.EvictingCache(tiny_model.model, agents.make("imitation-tiny"), **terms)
        told.append(generate(tiny_model.model, ids, torch.ones_like(ids), cache, 60, **options))
    assert torch.equal(*told)


def test_sampling_eos_and_streamers_work_as_ever(tiny_model) -> None:
    traces = kvenv.load_traces("recall", split="test", tokenizer=tiny_model.tokenizer)
    ids = torch.as_tensor(traces[0].tokens)[None, :100]
    said: list[str] = []

    class Said(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            said.append(text)

    def cache() -> kvenv.EvictingCache:
        return kvenv.EvictingCache(tiny_model.model, agents.make("h2o"), budget=48, interval=16)

    torch.manual_seed(0)
    one = tiny_model.model.generate(
        ids, past_key_values=cache(), do_sample=True, max_new_tokens=30, streamer=Said(tiny_model.tokenizer)
    )
    torch.manual_seed(0)
    again = tiny_model.model.generate(ids, past_key_values=cache(), do_sample=True, max_new_tokens=30)
    assert torch.equal(one, again)
    assert "".join(said).strip()
    end = int(one[0, 104])
    stopped = tiny_model.model.generate(
        ids, past_key_values=cache(), do_sample=False, max_new_tokens=30, eos_token_id=[end, *range(1, 500)]
    )
    assert stopped.shape[1] == 101


def test_the_model_is_switched_and_switched_back(caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(random_model("llama", torch.float32))  # one that no other test has switched
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="wasn't switched"):
        kvenv.restore(model)
    with caplog.at_level(logging.WARNING, logger="kvenv"):
        kvenv.EvictingCache(model, Random(), budget=8, interval=2, protection=PROTECTION)
    assert "LlamaForCausalLM was switched to kvenv's attention; kvenv.restore(model) undoes it" in caplog.text
    assert model.config._attn_implementation == "kvenv"
    caplog.clear()
    kvenv.EvictingCache(model, Random(), budget=8, interval=2, protection=PROTECTION)
    assert not caplog.text
    kvenv.restore(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budget": 0}, "budget must be an integer of at least 1, not 0"),
        ({"interval": 0}, "interval must be an integer of at least 1, not 0"),
        ({"schedule": "sometimes"}, "unknown schedule 'sometimes': known are periodic, prefill"),
        ({"budget": 20, "protection": None}, r"budget 20 is less than the 132 protected pairs \(sinks 4, recent 128\)"),
        ({"policy": agents.make("golden")}, "policy 'golden' needs future, and what is yet to be generated has no"),
    ],
)
def test_impossible_arguments_are_refused(changes: dict, says: str) -> None:
    arguments = {"policy": Random(), "budget": 200, "protection": PROTECTION} | changes
    with pytest.raises(ValueError, match=says):
        kvenv.EvictingCache(kvenv_model(), **arguments)


def test_misuse_is_refused() -> None:
    model = kvenv_model()
    ids, mask = left_padded([12, 7])

    def cache() -> kvenv.EvictingCache:
        return kvenv.EvictingCache(model, Random(), budget=8, interval=4, protection=PROTECTION)

    with pytest.raises(ValueError, match="nothing is cached yet"):
        _ = cache().positions
    with pytest.raises(ValueError, match="padding must be on the left"):
        generate(model, ids.flip(1), mask.flip(1), cache())
    with pytest.raises(ValueError, match="beam search"):
        generate(model, ids, mask, cache(), num_beams=2)
    with pytest.raises(ValueError, match="assisted decoding"):
        generate(model, ids[:1], mask[:1], cache(), prompt_lookup_num_tokens=2)
    used = cache()
    out = generate(model, ids, mask, used)
    with pytest.raises(ValueError, match="the cache has 2 rows, not the batch's 1"):
        generate(model, torch.cat([out[:1], ids[:1]], 1), torch.ones(1, 44, dtype=torch.long), used)
    used = cache()
    out = generate(model, ids, mask, used)
    later = torch.cat([out, ids], dim=1)
    padded = torch.ones_like(later)
    padded[1, out.shape[1] - 1 : out.shape[1] + 4] = 0
    with pytest.raises(ValueError, match="padding comes after cached tokens"):
        generate(model, later, padded, used)
