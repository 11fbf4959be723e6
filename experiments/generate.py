"""Let an LLM go on with a prompt under a budget, and say what that took."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import tyro
from torch import Tensor
from transformers import CompileConfig, DynamicCache, LogitsProcessorList, PreTrainedModel, TextStreamer

from experiments.cli import run
from experiments.evaluate import make_policies
from kvenv.attention import CACHE
from kvenv.finite import check_run
from kvenv.generation import EvictingCache
from kvenv.identity import cache_shape
from kvenv.models import LoadedModel, check_tokens, load_model
from kvenv.sampling import Finite, check_sampling
from kvenv.state import Protection
from kvenv.tasks.prompt import Framer


@dataclass
class Args:
    """Let an LLM go on with a prompt under a budget, and say what that took."""

    prompt: tyro.conf.Positional[str]
    """What the answer goes on from; - reads it from standard input."""
    model: str = "tiny"
    """The LLM: "tiny", a directory, a hub id or a registered name."""
    policy: str = "h2o"
    """A name, the directory or hub id of a learned policy, or "full" for no eviction."""
    budget: int = 1024
    """Pairs that every (layer, KV head) keeps after an eviction."""
    interval: int = 128
    """Tokens decoded between two evictions."""
    schedule: Literal["periodic", "prefill"] = "periodic"
    """Evict periodically, or once, at the end of the prompt."""
    max_new_tokens: int = 256
    """Most tokens of the answer."""
    temperature: float | None = None
    """Of sampling; 0 takes the likeliest token; if not given, as the model's own settings say."""
    top_p: float | None = None
    """Share of the probability that is sampled from; if not given, as the model's own settings say."""
    chat: bool = True
    """Whether the prompt is put into the tokenizer's chat template, if it has one."""
    sinks: int = 4
    """First tokens that are never evicted."""
    recent: int | None = None
    """Newest tokens that are never evicted; the interval if not given."""
    protect_prompt: bool = False
    """Whether the whole prompt is never evicted."""
    compile: bool = False
    """Whether the decoding of single tokens is compiled; the first tokens wait for it."""
    seed: int = 0
    """Of sampling, and of the policy's noise."""
    revision: str | None = None
    """Commit or tag of the model's hub id."""
    device: str = "cpu"
    """PyTorch device."""
    dtype: str = "float32"
    """The LLM's dtype."""

    def protection(self) -> Protection:
        """Return which pairs are never evicted."""
        return Protection(self.sinks, self.interval if self.recent is None else self.recent, self.protect_prompt)

    def sampling(self) -> dict[str, Any]:
        """Return what ``generate`` is told of sampling.

        Raises
        ------
        ValueError
            If a number is impossible.
        """
        check_sampling(self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p)
        if self.temperature == 0:
            plain = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | plain
        given = {"temperature": self.temperature, "top_p": self.top_p}
        told = {name: value for name, value in given.items() if value is not None}
        return told | ({"do_sample": True} if told else {})


class Clock(TextStreamer):
    """Prints text as it comes, and notes when.

    Attributes
    ----------
    times : list of float
        Of the prompt, and of each token.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time, and print."""
        self.times.append(time.perf_counter())
        super().put(value)


def encode(args: Args, loaded: LoadedModel) -> Tensor:
    """Return the prompt's tokens (1, T).

    Raises
    ------
    ValueError
        If it is empty, the tokenizer doesn't know a word of it, or it doesn't fit the model.
    """
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not text.strip():
        raise ValueError("the prompt is empty: say something to go on from")
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"model {loaded.name!r} was registered without a tokenizer: text needs one")
    framer = Framer(tokenizer, args.chat)
    ids = list(framer.frame(text, "", thinking=True)[0])
    if tokenizer.unk_token_id in framer.encode(text):
        unknown = [word for word in text.split() if tokenizer.unk_token_id in framer.encode(word)]
        raise ValueError(
            f"the tokenizer of model {loaded.name!r} doesn't know {' '.join(unknown[:5])!r}: say it otherwise"
        )
    check_tokens(loaded.model, ids, "the prompt")
    loaded.check_length(len(ids) + args.max_new_tokens, "the number of tokens of prompt and answer,")
    return torch.tensor([ids], device=loaded.model.device)


def compile_config(device: torch.device) -> CompileConfig:
    """Return how ``generate`` is to compile the decoding of single tokens; on a CPU it does so only if it is told."""
    if device.type != "cpu":
        return CompileConfig(dynamic=False)
    # Here constant weights and no Python between kernels count.
    config = CompileConfig(dynamic=False, mode=None, options={"freezing": True, "cpp_wrapper": True})  # type: ignore[arg-type]
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def generate(args: Args) -> str:
    """Print an answer as it is generated, and return what it took.

    Raises
    ------
    ValueError
        If an argument is impossible.
    FloatingPointError
        If the LLM's logits or the policy's priorities were NaN: what was printed means nothing.
    """
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {args.max_new_tokens} is impossible: it must be at least 1")
    sampling = args.sampling()
    loaded = load_model(args.model, dtype=args.dtype, device=args.device, revision=args.revision)
    model, ids = loaded.model, encode(args, loaded)
    ((_, policy),) = make_policies((args.policy,), args.device).items()
    evicting = None
    if policy is not None:
        evicting = EvictingCache(
            model,
            policy,
            budget=args.budget,
            interval=args.interval,
            schedule=args.schedule,
            protection=args.protection(),
            seed=args.seed,
            compileable=args.compile,
        )
    tokenizer: Any = loaded.tokenizer
    clock, finite = Clock(tokenizer), Finite()
    torch.manual_seed(args.seed)
    out = cast(Any, model.generate)(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        streamer=clock,
        logits_processor=LogitsProcessorList([finite]),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or 0,
        **({"compile_config": compile_config(ids.device)} if args.compile and evicting else {"disable_compile": True}),
        **{CACHE: evicting or DynamicCache(config=model.config)},
        **sampling,
    )
    check_run(args.policy, ["the prompt"], finite.lost, None if evicting is None else evicting.unranked)
    return report(model, clock.times, ids.shape[1], out.shape[1], evicting)


def report(
    model: PreTrainedModel, times: Sequence[float], prompt: int, tokens: int, cache: EvictingCache | None
) -> str:
    """Return what generating took: tokens per second, and the memory of the cache beside the full one's."""
    layers, heads, _, head_dim = cache_shape(model)
    # The last token is never fed.
    full = 2 * layers * heads * head_dim * model.dtype.itemsize * (tokens - 1)
    new, seconds = tokens - prompt, times[-1] - times[1]
    rate = f", {(new - 1) / seconds:.1f} tokens/s" if new > 1 else ""
    first = f"{new} tokens{rate}; the first after {times[1] - times[0]:.2f} s and a prompt of {prompt}"
    if cache is None:
        return f"{first}\nfull cache: {full / 1e6:,.1f} MB of keys and values"
    return f"{first}\ncache: {cache.nbytes / 1e6:,.1f} MB of keys and values; all of them would be {full / 1e6:,.1f} MB"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = tyro.cli(Args, args=argv, prog="kvenv generate")
    print(f"\n{generate(args)}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
