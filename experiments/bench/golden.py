"""Future attention, streaming, against attention probabilities held whole: time, and peak memory with the result."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.bench.machine import measure
from experiments.bench.measure import Row, Side, alternate, compare
from experiments.bench.memory import peak
from experiments.bench.models import large
from kvenv.attention import attention_probabilities, causal_bias
from kvenv.golden import RecordingCache

INTERVAL = 256
COMPARED, ALONE = 8192, 32_768
GIBIBYTES = 2.0
"""What the long trace may take."""


def rows(device: str) -> Iterator[Row]:
    """Measure one layer of the 100 M-parameter model."""
    sides = {name: side(name, COMPARED, device) for name in SIDES}
    torch.testing.assert_close(sides["streaming"](), sides["materialised"]())
    times = alternate(sides, 3, warmup=1, device=device)
    case, config = f"T = {COMPARED:,}, one layer", large(device).model.config
    # Logits and output of what is seen: half of all pairs of tokens.
    computed = 2 * COMPARED**2 * config.num_attention_heads * config.head_dim
    floor = measure(device).floor(0, computed)
    yield compare("golden", case, times, "streaming", "materialised", target="<= 1.0", floor=floor)
    ours, whole = (peak(side, name, COMPARED, device, device=device) / 2**20 for name in SIDES)
    yield Row("golden", case, "peak memory", ours, "MiB", whole, ours / whole, target="<= 0.1")
    alone = peak(side, "streaming", ALONE, device, device=device) / 2**30
    yield Row("golden", f"T = {ALONE:,}, one layer", "peak memory", alone, "GiB", target=f"<= {GIBIBYTES}")


def side(name: str, tokens: int, device: str) -> Side:
    """Return one of :data:`SIDES` on a layer's random queries (1, H * G, T, D), keys and values (1, H, T, D)."""
    config = large(device).model.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    generator = torch.Generator(device).manual_seed(0)
    pairs = [torch.randn(1, h, tokens, config.head_dim, generator=generator, device=device) for h in heads]
    compute = SIDES[name]
    return lambda: compute(*pairs)


def streaming(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the utilities (1, H, J, T) of one layer as a golden pass computes them, attention output and all."""
    tokens, device = key.shape[2], key.device
    cache = RecordingCache(large(str(device)).model, interval=INTERVAL)
    cache.expect(torch.arange(tokens, device=device)[None], torch.ones(1, tokens, dtype=torch.bool, device=device))
    cache.attend(0, query, key, value, query.shape[-1] ** -0.5, None)
    return cache.future(torch.zeros(1, dtype=torch.int64, device=device)).utility[0, :, :, :-1]


def materialised(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the same from the whole matrix of probabilities."""
    tokens, heads = key.shape[2], key.shape[1]
    query = query.unflatten(1, (heads, -1))
    position = torch.arange(float(tokens), device=key.device)
    bias = causal_bias(position[:, None], position, query.dtype)[None, None]
    attention = attention_probabilities(query, key, bias, query.shape[-1] ** -0.5)
    _ = attention.flatten(2, 3) @ value
    blocks = attention.mean(dim=2).unflatten(2, (-1, INTERVAL)).mean(dim=3)
    return blocks.flip(2).cummax(dim=2).values.flip(2)


SIDES = {"streaming": streaming, "materialised": materialised}
