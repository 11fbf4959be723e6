"""The switched model without kvenv's cache, and the handover between cache and attention."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kvenv import attention
from kvenv.attention import BEYOND, attend_block, attention_probabilities, causal_bias, use_kvenv_attention
from kvenv.cache import SlotCache
from tests.models import ARCHITECTURES, random_tokens
from tests.policies import kvenv_model
from tests.reference import copy_with


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_without_our_cache_the_switched_model_is_sdpa(architecture: str, padding: str | None) -> None:
    model = kvenv_model(architecture)
    ids = random_tokens(3, 17)
    column, lengths = torch.arange(17), torch.tensor([17, 9, 13])[:, None]
    mask = {"left": column >= 17 - lengths, "right": column < lengths, None: None}[padding]
    mask = None if mask is None else mask.long()
    with torch.no_grad():
        for cached in (False, True):
            ours, plain = (
                m(ids, attention_mask=mask, past_key_values=DynamicCache() if cached else None).logits
                for m in (model, copy_with(model, "sdpa"))
            )
            assert torch.equal(ours, plain)
        if padding == "left":  # transformers' eager attention gives NaN for float64 queries that see nothing
            return
        eager = copy_with(model, "eager")(ids, attention_mask=mask).logits
    where = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(ours[where], eager[where], rtol=0, atol=1e-4)


def test_generate_without_our_cache_is_plain() -> None:
    model, ids = kvenv_model(), random_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ours, plain = (
        m.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        for m in (model, copy_with(model, "sdpa"))
    )
    assert torch.equal(ours, plain)


def test_switching_twice_changes_nothing() -> None:
    model = kvenv_model()
    before = dict(model.named_buffers())
    use_kvenv_attention(model)
    assert model.config._attn_implementation == attention.NAME
    assert dict(model.named_buffers()).keys() == before.keys()


@pytest.mark.parametrize("where", ["attend", "update"])
def test_a_forward_that_dies_leaves_nothing_behind(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = kvenv_model(), random_tokens(1, 6)
    cache = SlotCache(model, rows=1, capacity=8, interval=4, budget=4)
    with torch.no_grad():
        plain = model(ids).logits

        class Broken(SlotCache):
            def update(self, *args: object, **kwargs: object) -> None:
                super().update(*args, **kwargs)
                raise RuntimeError("out of memory")

            def attend(self, *args: object) -> None:
                raise RuntimeError("out of memory")

        fed = torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool)
        broken = Broken(model, rows=1, capacity=8, interval=4, budget=4)
        if where == "attend":
            monkeypatch.setattr(Broken, "update", SlotCache.update)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(ids, past_key_values=broken)
        assert torch.equal(model(ids).logits, plain)
        assert getattr(attention._handover, "pending", None) is None
        cache.expect(*fed)
        ours = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-9)


def test_the_padding_mask_comes_through_unchanged() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert attention._mask(0, attention_mask=mask) is mask
    assert attention._mask(0) is None


def test_a_query_that_sees_nothing_stays_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        query, pairs = 30 * torch.randn(1, 2, 2, 3, 8, dtype=dtype), 30 * torch.randn(1, 2, 5, 8, dtype=dtype)
        precise = torch.promote_types(dtype, torch.float32)
        reach, held = torch.tensor([[4.0], [-1.0], [4.0]]), torch.arange(5.0)
        output = attend_block(query, pairs, pairs, causal_bias(reach, held, dtype)[None, None], 0.3)
        probabilities = attention_probabilities(query, pairs, causal_bias(reach, held, precise)[None, None], 0.3)
        assert output.isfinite().all()
        assert probabilities.isfinite().all()


def test_both_forms_of_attention_agree_and_see_what_is_allowed() -> None:
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 2, 4, 8, generator=rng, dtype=torch.float64)
    key, value = torch.randn(2, 2, 3, 7, 8, generator=rng, dtype=torch.float64)
    held = torch.stack([torch.randperm(7, generator=rng) for _ in range(6)]).view(2, 3, 1, 7).double()
    held[0, 1, 0, 3] = BEYOND
    reach = torch.tensor([[0.0], [2.0], [5.0], [6.0]]).double().expand(2, 1, 4, 1)
    allowed, bias = held <= reach, causal_bias(reach, held, torch.float64)
    probabilities = attention_probabilities(query, key, bias, 0.5)
    assert (probabilities[(~allowed)[:, :, None].expand_as(probabilities)] == 0).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, 2, 4).double())
    fused = attend_block(query, key, value, bias, 0.5)
    torch.testing.assert_close(fused, torch.einsum("nhgsc,nhcd->nhgsd", probabilities, value))


def test_models_outside_the_attention_interface_are_refused() -> None:
    config = AutoConfig.for_model(
        "bloom", vocab_size=16, hidden_size=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    with pytest.raises(ValueError, match="BloomForCausalLM doesn't go through transformers' attention interface"):
        use_kvenv_attention(AutoModelForCausalLM.from_config(config))
