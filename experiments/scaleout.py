"""``python -m experiments.scaleout``: what 8 and 64 GPUs would reach, worked out from what was measured.

Measured by ``python -m experiments.bench scaleout``: what a call costs, at what rate bytes come and go, how long the
learner's own step takes. Counted: the bytes of weights and gradients, the work of a part. Assumed: what a GPU reaches.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from experiments.bench.models import SHAPES
from experiments.bench.scaleout import TRACES
from experiments.cli import run
from experiments.learners import GRPO, PRESETS
from experiments.plan import REACHED, Shapes, plan
from experiments.runs import commit
from kvenv.files import write_atomic

RESULTS = Path(__file__).parent / "results"
MODEL, LENGTH, BUDGET, INTERVAL, DTYPE = "Qwen3-4B", 16_384, 1024, 256, "bfloat16"
"""The recipe of the README."""
WORKERS = (1, 8, 32, 64, 256)


@dataclass
class Args:
    """Work out what more GPUs would reach."""

    bench: Path = RESULTS / "bench.json"
    """Where the section scaleout is."""
    out: Path = RESULTS / "scaleout.md"
    """The page."""
    tflops: float = REACHED
    """TFLOP/s that a GPU reaches."""
    network: float = 1.25
    """GB/s between nodes: ten gigabits a second."""


@dataclass(frozen=True)
class Update:
    """An update that is divided into parts.

    Attributes
    ----------
    parts : int
        How many.
    part : float
        Seconds that a worker takes for one.
    nbytes : float
        Of the weights, and of a part's gradient.
    call, step : float
        Seconds of a call in which nothing is done, and of the learner's own step.
    rate : float
        Bytes per second into and out of the learner's node.
    gpus : int
        Of a node: weights are sent once to each.
    """

    parts: int
    part: float
    nbytes: float
    call: float
    step: float
    rate: float
    gpus: int = 8

    def seconds(self, workers: int) -> dict[str, float]:
        """Return how long each kind of work takes, of which the first two can't overlap."""
        return {
            "parts": math.ceil(self.parts / workers) * self.part,
            "step": self.step,
            "weights": self.nbytes * math.ceil(min(workers, self.parts) / self.gpus) / self.rate,
            "gradients": self.nbytes * self.parts / self.rate,
            "calls": self.call * self.parts,
        }

    def efficiency(self, workers: int) -> float:
        """Return what the workers reach, of what as many times one would."""
        return sum(self.seconds(1).values()) / sum(self.seconds(workers).values()) / workers


def recipe(traces: int) -> GRPO:
    """Return the README's recipe with so many traces in an update, each a part."""
    preset: Any = PRESETS["grpo", "foresightkv"]
    env = replace(
        preset.env, model=MODEL, trace_length=LENGTH, interval=INTERVAL, recent=INTERVAL, dtype=DTYPE, device="cuda"
    )
    learner = replace(preset.learner, num_traces=traces, at_once=1, budgets=(BUDGET,))
    return replace(preset, env=env, learner=learner, imitation_updates=0)


def planned(args: Args, measured: Mapping[str, float], traces: int) -> Update:
    """Return the recipe's update: its work counted, its messages at the measured cost."""
    config = recipe(traces)
    with tempfile.TemporaryDirectory() as directory:
        # A configuration is all that is needed of the LLM.
        (Path(directory) / "config.json").write_text(json.dumps(SHAPES[MODEL]), encoding="utf-8")
        config = replace(config, env=replace(config.env, model=directory))
        (stage,), shapes = plan(config), Shapes(config)
    nbytes = 4.0 * shapes.layers * shapes.heads * shapes.scored
    return Update(
        parts=traces,
        part=stage.flops / traces / args.tflops / 1e12,
        nbytes=nbytes,
        call=measured["a call"] / 1e3,
        step=measured["the learner's own step"] / 1e3 * nbytes * traces / (measured["gradients"] * 1e6),
        rate=1e9 * min(args.network, measured["sent"], measured["returned"]),
    )


def table(update: Update) -> list[str]:
    """Return a Markdown table of an update over workers."""
    lines = [
        "| GPUs | parts of each | an update | of it parts | gradients | weights | calls | step | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for workers in WORKERS:
        taken = update.seconds(workers)
        shown = " | ".join(f"{_number(taken[name])} s" for name in ("parts", "gradients", "weights", "calls", "step"))
        lines.append(
            f"| {workers} | {math.ceil(update.parts / workers)} | {_number(sum(taken.values()))} s | {shown} "
            f"| {update.efficiency(workers):.0%} |"
        )
    return lines


def page(args: Args, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """Return the page."""
    measured = {str(row["metric"]): float(row["value"]) for row in rows if row["case"].startswith(("grpo", "messages"))}
    measured["gradients"] = TRACES * measured["gradient of a part"]
    lines = [
        "# What more GPUs would reach",
        "",
        f"`python -m experiments.scaleout`, from `{about['command']}` ({about['date']}, commit {about['commit']}, "
        f"{about['machine'].get('cpu', 'this machine')}). Nothing here was measured on a GPU or across a network.",
        "",
        "## Measured here: workers on Ray beside one process, one thread each",
        "",
        "| what | | one process | efficiency |",
        "|---|---|---|---|",
    ]
    for row in rows:
        value = f"{_number(row['value'])} {row['unit']}"
        if row["ratio"] is None:
            lines.append(f"| {row['case']}: {row['metric']} | {value} | | |")
        else:
            spread = f"{row['ratio']:.0%} ± {row['spread']:.0%}"
            lines.append(
                f"| {row['case']}: {row['metric']} | {value} | {_number(row['baseline'])} {row['unit']} | {spread} |"
            )
    whole, more = planned(args, measured, 32), planned(args, measured, 256)
    lines += [
        "",
        f"## Worked out: {MODEL}, `--preset foresightkv`, {LENGTH:,} tokens, budget {BUDGET:,}",
        "",
        f"A part is a trace's eight rollouts, their replay and its full-cache pass: {whole.part:.1f} s at "
        f"{args.tflops:g} TFLOP/s (`kvenv plan` counts the work). The scorer's weights, and a part's gradient, are "
        f"{whole.nbytes / 1e6:.1f} MB; a node of {whole.gpus} GPUs is sent the weights once. Calls take what they took "
        "here, the learner's step as long for a byte of gradients, bytes the slower of "
        f"{args.network:g} GB/s of a network and what Ray reached here.",
        "",
        "32 traces in an update, as published:",
        "",
        *table(whole),
        "",
        "256 traces in an update:",
        "",
        *table(more),
        "",
        "## What saturates first",
        "",
        *saturation(whole),
        "",
    ]
    return "\n".join(lines)


def saturation(update: Update) -> list[str]:
    """Return what keeps more workers from helping, in the order in which it does."""
    alone = {name: seconds for name, seconds in update.seconds(update.parts).items() if name != "parts"}
    largest = max(alone, key=lambda name: alone[name])
    serial = sum(alone.values())
    return [
        f"1. **The number of parts.** An update has {update.parts}; from {update.parts} workers on, more have nothing "
        "to do. More traces an update (`--num-traces`) are more parts, and another algorithm: fewer, less noisy "
        "updates.",
        f"2. **Parts that don't divide.** {update.parts} parts on {update.parts - 1} workers take as long as on "
        f"{math.ceil(update.parts / 2)}.",
        f"3. **What the learner does alone**: {serial:.3g} s an update with a worker for every part, "
        f"{serial / update.part:.1%} of a part's time, most of it {largest}. It grows with the parts, not with the "
        "workers: with a worker for every part it would be half of an update at "
        f"{update.part / serial * update.parts:,.0f} of them.",
        "4. **Validation and pictures**: batches of 16 traces are what is divided, the picture is made by the learner; "
        "with `--eval-traces 4` one worker has all of it.",
        "5. **The imitation before it** is not divided at all (`kvenv plan` says how long it takes).",
    ]


def _number(x: float) -> str:
    """Return three digits, or all before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    args = tyro.cli(Args, args=argv, prog="python -m experiments.scaleout")
    if not args.bench.exists():
        raise ValueError(f"--bench {args.bench} isn't there: run `kvenv bench scaleout` first")
    sections = json.loads(args.bench.read_text(encoding="utf-8"))["sections"]
    if "scaleout" not in sections:
        raise ValueError(f"--bench {args.bench} has no section scaleout: run `kvenv bench scaleout` first")
    section = sections["scaleout"]
    write_atomic(args.out, page(args, section["rows"], section))
    print(f"page: {args.out} (commit {commit()})")


if __name__ == "__main__":
    run(main)
