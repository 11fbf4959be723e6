"""Hugging Face's generate under a budget: against its own full cache, and against kvpress evicting as often."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import agents
import kvenv
from experiments.bench.machine import Machine, measure
from experiments.bench.measure import Row, Side, alternate, compare
from experiments.bench.models import work
from experiments.bench.peer import Peer, kvpress
from experiments.bench.step import bare_copy
from experiments.generate import compile_config
from kvenv.attention import CACHE
from kvenv.models import load_model
from kvenv.state import Protection

POLICY, PROMPT = "imitation-tiny", 16
INTERVALS = {256: 128, 64: 16}
"""Of each budget."""
REPEATS = {512: 5, 2048: 2, 8192: 1}
"""Of each number of new tokens."""
BATCHES = (1, 8)
SINKS = 4
NEVER_SAID = 10**6
"""An EOS that no vocabulary has."""

_log = logging.getLogger("kvenv")


def rows(device: str) -> Iterator[Row]:
    """Measure a learned policy on the bundled model; kvpress takes its cheapest press."""
    machine, model = measure(device), load_model("tiny", device=device).model
    peer = start_peer(model, device)
    for batch in BATCHES:
        for new, repeats in REPEATS.items():
            yield from compared(machine, model, peer, batch, new, repeats, device)
    if peer is not None:
        peer.close()


def compared(
    machine: Machine, model: PreTrainedModel, peer: Peer | None, batch: int, new: int, repeats: int, device: str
) -> Iterator[Row]:
    """Measure one batch size and length at both budgets."""
    torch.manual_seed(0)
    prompt = torch.randint(4, model.config.vocab_size, (batch, PROMPT), device=device)
    plain = bare_copy(model, "sdpa")
    sides: dict[str, Side] = {"full cache": lambda: generate(plain, prompt, new)}
    for budget, interval in INTERVALS.items():
        sides |= {f"{name}, {budget}": side for name, side in ours(model, prompt, new, budget, interval).items()}
        if peer is not None:
            sides[f"kvpress, {budget}"] = theirs(peer, prompt, new, budget, interval)
    # What is compiled for the shortest text serves the others.
    times = alternate(sides, repeats, warmup=int(new == min(REPEATS)), device=device)
    case, tokens = f"batch {batch}, {new:,} tokens", batch * new
    for budget in INTERVALS:
        floor = new * machine.floor(*work(model, batch, 1, budget))
        for name in ("compiled", "eager"):
            for other in (f"kvpress, {budget}", "full cache"):
                if other in times:
                    bound = target(name, other, batch, new, budget)
                    mine = f"{name}, {budget}"
                    yield compare("generate", case, times, mine, other, amount=tokens, target=bound, floor=floor)


def target(name: str, other: str, batch: int, new: int, budget: int) -> str:
    """Return what a ratio of tokens per second is to be."""
    if other.startswith("kvpress"):
        return ">= 2.0" if (name, batch) == ("compiled", 1) else ">= 1.0"
    return ">= 1.0" if name == "compiled" and new > 4 * budget else ""


def ours(model: PreTrainedModel, prompt: Tensor, new: int, budget: int, interval: int) -> dict[str, Side]:
    """Return generating under a budget, compiled and not."""
    policy, protection = agents.make(POLICY), Protection(SINKS, interval)
    compiled = compile_config(prompt.device)

    def side(compileable: bool) -> Side:
        how = {"compile_config": compiled} if compileable else {"disable_compile": True}

        def run() -> Tensor:
            cache = kvenv.EvictingCache(
                model, policy, budget=budget, interval=interval, protection=protection, compileable=compileable
            )
            return generate(model, prompt, new, **{CACHE: cache}, **how)

        return run

    return {"eager": side(False), "compiled": side(True)}


def theirs(peer: Peer, prompt: Tensor, new: int, budget: int, interval: int) -> Side:
    """Return the same by kvpress."""
    ids = prompt.tolist()
    return lambda: peer.ask(prompt=ids, new=new, budget=budget, interval=interval)


def generate(model: PreTrainedModel, prompt: Tensor, new: int, **options: object) -> Tensor:
    """Return the prompt (N, P) and exactly ``new`` greedy tokens."""
    return model.generate(  # type: ignore[operator]  # transformers types the mixin's method as a tensor
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False,
        eos_token_id=NEVER_SAID, pad_token_id=0, **options,
    )  # fmt: skip


def start_peer(model: PreTrainedModel, device: str) -> Peer | None:
    """Return kvpress with the same weights, None where it can't be installed."""
    with tempfile.TemporaryDirectory() as directory:
        bare_copy(model, "sdpa").save_pretrained(directory)
        try:
            peer = kvpress(Path(__file__).with_name("kvpress_peer.py"), [directory, device])
            # It answers when it has read the weights, which are gone then.
            peer.ask(prompt=[[4, 5]], new=2, budget=64, interval=16)
        except OSError as error:
            _log.warning("kvpress is left out: %s", error)
            return None
    return peer
