"""``make demo``: train a first agent by imitation, then by GRPO, compare it with all others, look at what it keeps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import agents
from agents.grpo import GRPOConfig
from agents.imitation import ImitationConfig
from experiments import evaluate, learners, show, train
from experiments.speed import measure
from experiments.tables import report, wide_console
from kvenv.models import load_model

NOT_COMPARED = ("golden-expected",)
"""Takes a minute a trace; `kvenv headroom` has it."""


@dataclass
class Args:
    """Train a first agent, evaluate it beside every heuristic, show a trace."""

    out: Path = Path("runs/demo")
    """Directory for everything the demo writes."""
    updates: tuple[int, int] = (24, 6)
    """Updates of imitation, and then of grpo."""
    traces: tuple[str, ...] = ("recall", "tracking", "dialogue", "reasoning")
    """Trace families that the agent is trained and tested on."""
    num_traces: int = 12
    """Held-out traces of each family."""
    budgets: tuple[int, ...] = (32, 64, 128)
    """Pairs that every (layer, KV head) keeps after an eviction."""
    device: str = "cpu"
    """PyTorch device."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    args = tyro.cli(Args, args=argv, prog="kvenv demo")
    console = wide_console()
    # On free cores two threads are 1.4 times as fast as one; beside any other busy process they are 10 times slower.
    torch.set_num_threads(1)

    console.rule("1. The environment on this machine")
    speed = measure(load_model("tiny", device=args.device))
    console.print(
        f"{speed.steps_per_second:,.0f} env steps/s, {speed.tokens_per_second:,.0f} tokens/s, "
        f"{speed.ratio:.2f} x the time of the bare forward (16 traces at once, budget 64, interval 16)"
    )

    decoding = learners.RolloutArgs(traces="+".join(args.traces), device=args.device)
    imitating, improving = args.updates

    def trained(kind: Any, config: Any) -> str:
        updates = config.updates
        kept = learners.RunArgs(out=args.out / kind.name, eval_every=updates, eval_traces=args.num_traces)
        shutil.rmtree(kept.out, ignore_errors=True)  # a demo starts afresh, where a run would refuse to
        policy = str(train.train(kind(decoding, config, kept)))
        console.print(f"policy saved to {policy}")
        return policy

    console.rule("2. Imitation of Golden Eviction on training traces")
    imitation = trained(learners.Imitation, ImitationConfig(updates=imitating, budgets=args.budgets))
    console.rule("3. GRPO from there: rollouts of the same trace, compared with each other")
    grpo = trained(learners.GRPO, GRPOConfig(updates=improving, budgets=args.budgets, init=imitation))

    console.rule("4. Evaluation on held-out traces")
    rivals = [name for name in agents.names(trained=False) if name not in NOT_COMPARED]
    evaluation = evaluate.Args(
        policies=("full", imitation, grpo, *rivals), budgets=args.budgets, traces=args.traces,
        num_traces=args.num_traces, out=args.out / "evaluation", device=args.device,
    )  # fmt: skip
    shutil.rmtree(evaluation.out, ignore_errors=True)
    report(evaluate.measure(evaluation), evaluation.out, console)

    console.rule("5. One trace, window by window")
    show.main([
        "--policy", grpo, "--traces", args.traces[0], "--budget", "64", "--device", args.device,
        "--out", str(args.out / "trace.png"),
    ])  # fmt: skip

    console.rule("Written")
    for what, path in (
        ("policies", f"{imitation}, {grpo}"),
        ("rows", evaluation.out / "results.json"),
        ("loss over budget", evaluation.out / "loss.png"),
        ("trace", args.out / "trace.png"),
    ):
        console.print(f"{what}: {path}")
    console.print(f"curves and comparison: .venv/bin/tensorboard --logdir {args.out}")


if __name__ == "__main__":
    from experiments.cli import run

    run(main)
