"""The counter-based noise: uniform, never 0 or 1, a function of its counters alone."""

from __future__ import annotations

import pytest
import torch

from kvenv import noise
from kvenv.cache import SlotCache
from kvenv.state import Protection
from tests.policies import Random, kvenv_model, random_traces, step_through


def counters(*sizes: int) -> list[torch.Tensor]:
    """Return one axis of counters each."""
    return [torch.arange(size).view(-1, *[1] * (len(sizes) - i - 1)) for i, size in enumerate(sizes)]


def test_it_is_uniform_over_every_counter() -> None:
    x = noise.uniform(7, *counters(8, 4, 4, 8, 256))
    assert x.shape == (8, 4, 4, 8, 256)
    assert x.dtype == torch.float32
    for axis in range(x.dim()):
        means = x.double().mean(dim=[d for d in range(x.dim()) if d != axis])
        allowed = 5 * (1 / 12 / (x.numel() / x.shape[axis])) ** 0.5
        assert (means - 0.5).abs().max() < allowed
    counts = torch.histc(x, bins=64, min=0, max=1)
    expected = x.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 130  # chi-square, 63 degrees of freedom: p = 1e-6


def test_neighbours_are_uncorrelated() -> None:
    x = noise.uniform(0, *counters(64, 64, 64)).double() - 0.5
    for axis in range(3):
        a, b = x.narrow(axis, 0, 63), x.narrow(axis, 1, 63)
        assert abs(float((a * b).mean() * 12)) < 5 / a.numel() ** 0.5


def test_neighbouring_counters_do_not_collide() -> None:
    # 23 bits collide by chance: 8,192 draws share about 4 values, symmetric or linear counters would share thousands.
    x = noise.uniform(*counters(2, 4, 4, 4, 64)).flatten()
    assert len(x.unique()) > len(x) - 25
    swapped = noise.uniform(torch.arange(200)[:, None], torch.arange(200)[None])
    assert (swapped == swapped.T).sum() < 200 + 10, "counters have places"


@pytest.mark.parametrize("seed", [-1, 2**31, 2**63, 2**64 + 3, -(2**63)])
def test_any_seed_works(seed: int) -> None:
    x = noise.uniform(seed, torch.arange(100))
    assert len(x.unique()) == 100
    assert not torch.equal(x, noise.uniform(seed + 1, torch.arange(100)))


def test_it_never_reaches_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    # float32 can't hold 24 random bits and a half: the largest would round to 1.
    for extreme in (-1, 0):
        monkeypatch.setattr(noise, "_mix", lambda x, extreme=extreme: torch.full_like(x, extreme))
        x = noise.uniform(torch.arange(3))
        assert ((x > 0) & (x < 1)).all()
        assert (-(-x.log()).log()).isfinite().all()


def test_the_caches_noise_is_by_position_not_by_slot() -> None:
    model = kvenv_model()
    _, _, cache = step_through(
        Random(), random_traces([60, 60]), model=model, budget=12, interval=5, protection=Protection(1, 2), seed=3
    )
    state = cache.layer_state(1)
    slots = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    other = SlotCache(model, rows=2, capacity=17, interval=5, budget=12, needs={"noise"}, seed=3)
    other.positions.copy_(cache.positions[:, [1, 0]][..., slots])
    other.next_position.copy_(cache.next_position)
    other.rollout.copy_(torch.tensor([1, 0]))
    assert torch.equal(other.layer_state(1).noise, state.noise[[1, 0]][..., slots])
    assert not torch.equal(other.layer_state(0).noise, other.layer_state(1).noise)
    assert not torch.equal(state.noise[:, 0], state.noise[:, 1])
