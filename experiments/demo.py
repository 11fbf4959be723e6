"""``make demo``: train a first agent, compare it with everything else, look at what it keeps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import agents
from agents.imitation import ImitationConfig
from experiments import evaluate, learners, show, train
from experiments.speed import measure
from kvenv.models import load_model

NOT_COMPARED = ("golden-expected",)
"""Takes a minute a trace; `kvenv headroom` has it."""


@dataclass
class Args:
    """Train a first agent, evaluate it beside every heuristic, show a trace."""

    out: Path = Path("runs/demo")
    """Directory for everything the demo writes."""
    updates: int = 400
    """Gradient steps of the imitation."""
    traces: tuple[str, ...] = ("recall", "tracking", "dialogue", "reasoning")
    """Trace families that the agent is trained and tested on."""
    num_traces: int = 16
    """Held-out traces of each family."""
    budgets: tuple[int, ...] = (32, 64, 128)
    """Pairs that every (layer, KV head) keeps after an eviction."""
    device: str = "cpu"
    """PyTorch device."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    args = tyro.cli(Args, args=argv, prog="kvenv demo")
    console = evaluate.wide_console()
    # On free cores two threads are 1.4 times as fast as one; beside any other busy process they are 10 times slower.
    torch.set_num_threads(1)

    console.rule("1. The environment on this machine")
    speed = measure(load_model("tiny", device=args.device))
    console.print(
        f"{speed.steps_per_second:,.0f} env steps/s, {speed.tokens_per_second:,.0f} tokens/s, "
        f"{speed.ratio:.2f} x the time of the bare forward (16 traces at once, budget 64, interval 16)"
    )

    console.rule("2. Imitation of Golden Eviction on training traces")
    environment = learners.EnvironmentArgs(traces="+".join(args.traces), device=args.device)
    learner = ImitationConfig(updates=args.updates)
    kept = learners.RunArgs(out=args.out / "imitation", eval_every=args.updates // 2, eval_traces=args.num_traces)
    shutil.rmtree(kept.out, ignore_errors=True)  # a demo starts afresh, where a run would refuse to
    policy = str(train.train(learners.Imitation(environment, learner, kept)))
    console.print(f"policy saved to {policy}")

    console.rule("3. Evaluation on held-out traces")
    rivals = [name for name in agents.names() if name not in NOT_COMPARED]
    evaluation = evaluate.Args(
        policies=("full", policy, *rivals), budgets=args.budgets, traces=args.traces, num_traces=args.num_traces,
        out=args.out / "evaluation", device=args.device,
    )  # fmt: skip
    evaluate.report(evaluate.measure(evaluation), evaluation.out, console)

    console.rule("4. One trace, window by window")
    show.main([
        "--policy", policy, "--traces", args.traces[0], "--budget", "64", "--device", args.device,
        "--out", str(args.out / "trace.png"),
    ])  # fmt: skip

    console.rule("Written")
    for what, path in (
        ("policy", policy),
        ("rows", evaluation.out / "results.json"),
        ("loss over budget", evaluation.out / "loss.png"),
        ("trace", args.out / "trace.png"),
    ):
        console.print(f"{what}: {path}")
    console.print(f"curves and comparison: .venv/bin/tensorboard --logdir {args.out}")


if __name__ == "__main__":
    from experiments.cli import run

    run(main)
