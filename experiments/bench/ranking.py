"""Plackett-Luce in O(C log C) against the quadratic form: sampling, and the log-probability of 16 picks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.bench.measure import Row, Side, alternate, compare
from kvenv import plackett_luce

SLOTS = (64, 256, 1024, 4096, 16_384)
PICKS = 16


def rows(device: str) -> Iterator[Row]:
    """Measure one head, of more and more slots."""
    for slots in SLOTS:
        times = alternate(sides(slots, device), 9, device=device)
        case = f"C = {slots:,}"
        yield compare("ranking", case, times, "sample", "sample pick by pick")
        yield compare("ranking", case, times, "log-probability", "quadratic log-probability")


def sides(slots: int, device: str) -> dict[str, Side]:
    """Return what is compared, all on the same random logits."""
    generator = torch.Generator(device).manual_seed(0)
    logits, uniform = (torch.rand(1, slots, generator=generator, device=device) for _ in range(2))
    positions, mask = torch.arange(slots, device=device)[None], torch.ones_like(logits, dtype=torch.bool)
    order = plackett_luce.sample(logits, positions, mask, uniform)
    picks = (logits, order, mask, torch.full((1,), PICKS, device=device), PICKS)
    ours, plain = plackett_luce.log_prob(*picks), quadratic_log_prob(logits, order)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    return {
        "sample": lambda: plackett_luce.sample(logits, positions, mask, uniform),
        "sample pick by pick": lambda: sequential_sample(logits, generator),
        "log-probability": lambda: plackett_luce.log_prob(*picks),
        "quadratic log-probability": lambda: quadratic_log_prob(logits, order),
    }


def sequential_sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the picks drawn one after the other, each from a softmax over what is left."""
    left, picks = logits.clone(), []
    for _ in range(PICKS):
        pick = torch.multinomial(left.softmax(dim=-1), 1, generator=generator)
        left.scatter_(-1, pick, -torch.inf)
        picks.append(pick)
    return torch.cat(picks, dim=-1)


def quadratic_log_prob(logits: Tensor, order: Tensor) -> Tensor:
    """Return each pick's log-probability from a mask (picks x slots) of what is left, as KVP's authors compute it."""
    ordered = logits.gather(-1, order)
    slots = torch.arange(order.shape[-1], device=order.device)
    left = slots >= slots[:, None]
    whole = torch.where(left, ordered[..., None, :], -torch.inf)
    return (ordered - whole.logsumexp(dim=-1))[..., :PICKS]
