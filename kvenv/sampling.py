"""How answers are sampled: reproducibly, row by row, whatever a model's own settings say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from kvenv import noise


def check_sampling(temperature: float, top_p: float) -> None:
    """Refuse numbers that nothing can be sampled by.

    Raises
    ------
    ValueError
        If the temperature is below 0, or ``top_p`` no share above 0.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature} is impossible: it must be at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is impossible: it must be a share above 0 of at most 1")


class Sampling(LogitsProcessor):
    """Lets the likeliest token be a sample, of which seed, example and place alone decide: no other row, no batch size.

    Parameters
    ----------
    seed : int
        Of the noise.
    examples : sequence of int
        Number of each row's example.
    temperature, top_p : float
        As in :class:`kvenv.answering.Decoding`.
    """

    def __init__(self, seed: int, examples: Sequence[int], temperature: float, top_p: float) -> None:
        self.seed, self.examples, self.place = seed, torch.as_tensor(examples), 0
        self._temperature, self._top_p = TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return logits (N, V) with Gumbel noise (Gumbel-max)."""
        logits = self._top_p(input_ids, self._temperature(input_ids, scores.float()))
        token = torch.arange(logits.shape[-1], device=logits.device)
        drawn = noise.uniform(self.seed, self.examples.to(logits.device)[:, None], self.place, token)
        self.place += 1
        return logits - (-drawn.log()).log()


class Finite(LogitsProcessor):
    """Notes on the device which rows get logits that are NaN or infinite; those become 0, which can be sampled from.

    Attributes
    ----------
    lost : Tensor (N,) bool
        So far.
    """

    lost: torch.Tensor

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the logits (N, V)."""
        # The largest is NaN if one is; -inf alone forbids a token, as generate does.
        lost = ~scores.amax(dim=-1).isfinite()
        self.lost = lost | self.lost if hasattr(self, "lost") else lost
        return scores.where(~lost[:, None], 0.0)


@contextmanager
def own_settings(model: Any, pad: int) -> Iterator[None]:
    """Let a model generate greedily, whatever penalties and sampling its own settings have; only its ends stay."""
    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=before.eos_token_id, pad_token_id=pad, do_sample=False)
    try:
        yield
    finally:
        model.generation_config = before
