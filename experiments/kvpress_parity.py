"""``python -m experiments.kvpress_parity``: do kvenv's policies decide in kvpress as they do in kvenv?

kvpress runs in ``runs/kvpress-venv``, a virtual environment of its own that is made on the first call: it needs another
transformers. There :class:`agents.kvpress_press.KVEnvPress` evicts from prompts, here ``kvenv.EvictingCache`` with
``schedule="prefill"``; the positions kept by every (layer, KV head) and the tokens generated then are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import agents
import kvenv
from experiments.bench.peer import KVPRESS, Peer, kvpress
from experiments.cli import run
from experiments.progress import track
from experiments.runs import commit
from kvenv.attention import CACHE
from kvenv.files import write_atomic
from kvenv.models import TINY, load_model
from kvenv.traces import FAMILIES, load_traces

INTERVAL = 16
LENGTHS = (160, 203, 256, 335)
"""Tokens of the prompts, one of each family; not all are a multiple of the interval."""
NEVER_SAID = 10**6
"""An EOS that no vocabulary has."""


@dataclass
class Args:
    """Compare kvenv's policies in kvpress with themselves, on the bundled LLM."""

    policies: tuple[str, ...] = (*agents.TRAINED, "keydiff", "h2o", "snapkv", "tova")
    """Policies by name, such as need keys, values, positions and attention only."""
    ratios: tuple[float, ...] = (0.5, 0.75)
    """kvpress's compression ratios: shares of a prompt that go."""
    new: int = 32
    """Tokens generated after each prompt."""
    out: Path = Path("runs/kvpress-parity.txt")
    """Where the table goes."""


@dataclass(frozen=True)
class Agreement:
    """One policy's decisions on one prompt.

    Attributes
    ----------
    heads, same_heads : int
        (Layer, KV head) pairs, and those that kept the same positions on both sides.
    tokens, same_tokens : int
        Generated tokens, and how many were equal before the first other one.
    """

    heads: int
    same_heads: int
    tokens: int
    same_tokens: int


def prompts() -> list[Tensor]:
    """Return prompts (1, P) from test traces of the bundled LLM."""
    tokenizer = load_model("tiny").tokenizer
    sources = [load_traces(family, split="test", tokenizer=tokenizer) for family in FAMILIES]
    return [torch.as_tensor(source[0].tokens)[None, :length] for source, length in zip(sources, LENGTHS)]


def ours(model: PreTrainedModel, policy: str, prompt: Tensor, budget: int, new: int) -> tuple[Tensor, list[int]]:
    """Return the prompt's positions that are kept (L, H, B), in order, and the tokens generated greedily."""
    terms = {"budget": budget, "interval": INTERVAL, "schedule": "prefill"}
    cache = kvenv.EvictingCache(model, agents.make(policy), **terms)  # type: ignore[arg-type]
    out = model.generate(  # type: ignore[operator]  # transformers types the mixin's method as a tensor
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False,
        eos_token_id=NEVER_SAID, pad_token_id=0, **{CACHE: cache},
    )  # fmt: skip
    length = prompt.shape[1]
    positions = cache.positions[:, 0].masked_fill(cache.positions[:, 0] < 0, length).sort().values
    return positions[..., :budget], out[0, length:].tolist()


def compared(args: Args, peer: Peer) -> Iterator[tuple[str, Agreement]]:
    """Yield what policies did in turn, by name."""
    model, given = load_model("tiny").model, prompts()
    for policy in track(args.policies, "comparing"):
        for prompt in given:
            for ratio in args.ratios:
                theirs = peer.ask(prompt=prompt.tolist(), policy=policy, ratio=ratio, new=args.new)
                kept = torch.tensor(theirs["kept"])
                positions, tokens = ours(model, policy, prompt, kept.shape[-1], args.new)
                same = (positions == kept).all(dim=-1)
                pairs = enumerate(zip(tokens, theirs["tokens"], strict=True))
                first = next((number for number, (one, other) in pairs if one != other), len(tokens))
                yield policy, Agreement(same.numel(), int(same.sum()), len(tokens), first)


def table(found: dict[str, list[Agreement]]) -> Table:
    """Return the agreement of each policy."""
    result = Table("policy", "prompts x ratios", "heads that kept the same", "tokens that are the same")
    for policy, each in found.items():
        heads, tokens = (
            f"{sum(getattr(one, f'same_{what}') for one in each):,} of {sum(getattr(one, what) for one in each):,}"
            for what in ("heads", "tokens")
        )
        result.add_row(policy, str(len(each)), heads, tokens)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; the exit code is 1 if anything differs."""
    args = tyro.cli(Args, args=argv, prog="python -m experiments.kvpress_parity")
    peer = kvpress(Path(__file__).with_name("kvpress_parity_peer.py"), [str(TINY)])
    found: dict[str, list[Agreement]] = {}
    for policy, one in compared(args, peer):
        found.setdefault(policy, []).append(one)
    peer.close()
    console = Console(width=120, record=True)
    console.print(f"python -m experiments.kvpress_parity, {datetime.now(timezone.utc).date()}, commit {commit()}")
    here, there = f"transformers {version('transformers')} here", f"{', '.join(KVPRESS)} there"
    console.print(f"{here}, {there}, PyTorch {version('torch')}; ratios {', '.join(map(str, args.ratios))}")
    console.print(table(found))
    write_atomic(args.out, console.export_text())
    if any(one.heads != one.same_heads or one.tokens != one.same_tokens for each in found.values() for one in each):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
