"""Show what a policy keeps of one trace, window by window: in the terminal, or as a PNG or GIF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.text import Text

from experiments.evaluate import make_policies
from experiments.story import DISAGREES, NOTABLE, Story, follow
from kvenv.models import load_model
from kvenv.state import Protection
from kvenv.traces import load_traces

COLOURS = ("bright_black", "red", "yellow", "green")
"""Colours of tokens of which no head, few, many or nearly all heads keep the pair."""


@dataclass
class Args:
    """Show what a policy keeps of one trace, window by window."""

    policy: str
    """A name, or the directory of a learned policy."""
    traces: str = "recall"
    """A family, a file, a dataset or a registered name."""
    trace: int = 0
    """Id of the trace in the split's sequence."""
    trace_length: int = 512
    """Tokens of the trace."""
    split: str = "test"
    """Split of the traces: train, validation or test."""
    seed: int = 0
    """Seed of the noise."""
    budget: int = 64
    """Pairs that every (layer, KV head) keeps after an eviction."""
    interval: int = 16
    """Tokens decoded between two evictions."""
    sinks: int = 4
    """First tokens that are never evicted."""
    recent: int | None = None
    """Newest tokens that are never evicted; the interval if not given."""
    protect_prompt: bool = False
    """Whether the whole prompt is never evicted."""
    model: str = "tiny"
    """The LLM: "tiny", a directory, a hub id or a registered name."""
    device: str = "cpu"
    """PyTorch device."""
    dtype: str = "float32"
    """The LLM's dtype."""
    out: Path | None = None
    """Save a picture instead: a .png of all decisions, or a .gif of one after another."""


def print_story(story: Story, console: Console) -> None:
    """Print a story window by window: what is held of the text before, then the window's tokens with their losses."""
    if not story.decisions:
        console.print("Nothing is evicted.")
        return
    console.print(_legend())
    for number, start, stop in story.windows():
        lost = float((story.nll - story.full_nll)[start + 1 : stop + 1].sum())
        console.rule(f"decision {number + 1} of {len(story.decisions)}: tokens {start} to {stop - 1}, {lost:+.2f} nats")
        console.print(_held(story, number, start))
        console.print(_fed(story, start, stop))


def _legend() -> Text:
    legend = Text("held before a window, share of heads: ")
    for colour, share in zip(COLOURS, ("none (shown as ·)", "up to 1/3", "up to 2/3", "more"), strict=True):
        legend.append(f"{share}  ", style=colour)
    legend.append("golden disagrees", style="underline")
    legend.append(f"\nloss under the policy|full cache in nats; answers bold, {NOTABLE} nat or more lost: ")
    return legend.append("red", style="bold red")


def _held(story: Story, number: int, stop: int) -> Text:
    """Return the text before a window, coloured by the share of heads that hold each token; · for lost ones."""
    text, gap = Text(), False
    for token in range(stop):
        share, marked = story.kept[number, token], story.disagreement[number, token] >= DISAGREES
        if not share and not marked:
            text.append("" if gap else "· ", style=COLOURS[0])
            gap = True
            continue
        gap = False
        style = COLOURS[0] if not share else COLOURS[1 + min(2, int(share * 3))]
        text.append(story.words[token], style=f"{style} underline" if marked else style)
        text.append(" ")
    return text


def _fed(story: Story, start: int, stop: int) -> Text:
    """Return a window's tokens, each with its loss under the policy and under the full cache."""
    text = Text("→ ")
    for token in range(start, stop):
        lost = story.nll[token] - story.full_nll[token] >= NOTABLE
        style = ("bold " if story.answer[token] else "") + ("red" if lost else "default")
        text.append(story.words[token], style=style)
        text.append(f" {story.nll[token]:.1f}|{story.full_nll[token]:.1f}  ", style="red" if lost else "dim")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = tyro.cli(Args, args=argv, prog="kvenv show")
    if args.out is not None and args.out.suffix not in (".png", ".gif"):
        raise ValueError(f"--out {args.out} must end in .png or .gif")
    ((name, policy),) = make_policies([args.policy], args.device).items()
    loaded = load_model(args.model, dtype=args.dtype, device=args.device)
    loaded.check_length(args.trace_length)
    source = load_traces(args.traces, split=args.split, tokenizer=loaded.tokenizer, trace_length=args.trace_length)
    try:
        trace = source[args.trace]
    except IndexError as error:
        raise ValueError(str(error)) from error
    story = follow(
        policy,
        source,
        args.trace,
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        budget=args.budget,
        interval=args.interval,
        protection=Protection(args.sinks, args.interval if args.recent is None else args.recent, args.protect_prompt),
        seed=args.seed,
    )
    console = Console()
    title = f"{name} on {trace.name}, budget {args.budget}"
    console.print(title, style="bold", highlight=False)
    print_story(story, console)
    if args.out is not None:
        # Imported here: matplotlib takes a second.
        from experiments.plots import animate_story, plot_story

        (plot_story if args.out.suffix == ".png" else animate_story)(story, title, args.out)
        console.print(f"picture: {args.out}")


if __name__ == "__main__":
    from experiments.cli import run

    run(main)
