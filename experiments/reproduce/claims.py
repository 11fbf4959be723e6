"""``python -m experiments.reproduce claims``: train, measure and judge everything that kvenv claims of its agents.

Every training and every measurement is a job of its own: what is done stays done, and a second call goes on. The
defaults are what the committed results were made with; smaller numbers try it out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import agents
from experiments.report import load
from experiments.reproduce import verdicts
from experiments.reproduce.plan import LEARNERS, MIDDLE, Plan, Size, attention_free, heuristics
from experiments.reproduce.verdicts import Chosen, Claim, Measured
from experiments.runs import CONFIG, POLICY, commit, read_config
from experiments.tables import wide_console
from kvenv.files import write_atomic


@dataclass
class Args:
    """Train, measure and judge what kvenv claims of its agents."""

    out: Path = Path("runs/claims")
    """Directory for trainings, rows, and claims.md, claims.json and learning.png; a second call goes on there."""
    processes: int = 2
    """Jobs at a time, each on one thread."""
    ship: bool = False
    """Install the policies of the first seed as imitation-tiny, kvp-tiny, grpo-tiny and ppo-tiny of this checkout."""
    size: tyro.conf.OmitArgPrefixes[Size] = field(default_factory=Size)


def judge(plan: Plan) -> list[Claim]:
    """Return the claims as far as they were measured."""
    budgets = plan.size.budgets
    test, chosen = Measured(plan.rows("test")), Chosen(Measured(plan.rows("validation")), LEARNERS, heuristics())
    return [
        verdicts.half_budget(test, chosen, budgets),
        verdicts.rl_adds(test, budgets),
        verdicts.gap_closed(test, chosen, budgets),
        verdicts.kvp_alone(test, attention_free(), budgets),
        verdicts.transfer(test, Measured(plan.rows("long")), attention_free(), MIDDLE),
        verdicts.ppo_learns(test, (MIDDLE,)),
        verdicts.smallest_budgets(test, budgets),
        verdicts.summary(test, budgets),
    ]


def ship(plan: Plan, made: dict[str, Any]) -> None:
    """Install the first seed's policies in this checkout."""
    for learner in LEARNERS:
        name, seed = f"{learner}-tiny", plan.size.seeds[0]
        policy: Any = agents.make(plan.run(f"{learner}-{seed}") / POLICY)
        own = asdict(plan.arguments(learner, seed).learner)
        if own.get("init"):
            own["init"] = "imitation-tiny"
        made_by = {key: made[key] for key in ("command", "date")}
        made_by["commit"] = read_config(plan.run(f"{learner}-{seed}"))["commit"]
        policy.name, policy.training = name, {"learner": learner, **own, **made_by}
        policy.save_pretrained(Path(agents.__file__).parent / "trained" / name)


def learning_curves(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return grpo's and ppo's answer loss on validation traces, by tokens decoded in training and by wall clock."""
    curves: dict[str, Any] = {}
    for learner in ("grpo", "ppo"):
        for one in load([plan.run(f"{learner}-{seed}") for seed in plan.size.seeds]):
            steps, seconds, values = one.of("eval/answer_loss")
            curves[one.name] = ([step * plan.tokens(learner) / 1e6 for step in steps], seconds, values)
    return {"answer loss on validation traces (nats)": curves}


def markdown(claims: Sequence[Claim], plan: Plan, made: dict[str, Any]) -> str:
    """Return the claims as a page."""
    size, spent = plan.size, made["minutes"]
    lines = [
        "# What was claimed, and what was found",
        "",
        f"`{made['command']}`, {made['date']}, commit {made['commit']}, trained at {', '.join(made['trained_at'])}: "
        f"training seeds {_listed(size.seeds)}, "
        f"{size.num_traces} test traces of each family, budgets {_listed(size.budgets)} of 512 tokens. The best of a "
        f"kind was chosen on {size.validation_traces} validation traces of each family and seed. Answer loss in nats, "
        "differences with paired 95 % intervals (bootstrap over traces and training seeds).",
        "",
        f"That took {sum(spent.values()) / 60:.1f} hours of one core, validation during training left out: "
        f"{', '.join(f'{kind} {value:.0f} min' for kind, value in spent.items())}.",
    ]
    for claim in claims:
        verdict = "" if claim.held is None else " **Holds.**" if claim.held else " **Does not hold.**"
        lines += ["", f"## {claim.name}", "", claim.says + verdict]
        lines += ["", f"| {' | '.join(claim.headings)} |", f"|{' --- |' * len(claim.headings)}"]
        lines += [f"| {' | '.join(map(str, line))} |" for line in claim.table]
        lines += ["", claim.note] if claim.note else []
    return "\n".join(lines) + "\n"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def minutes(plan: Plan, times: dict[str, float]) -> dict[str, float]:
    """Return what recording, training and measuring took, by kind.

    A training knows its own seconds, interruptions or not; those of the others are their jobs'.
    """
    kinds: dict[str, float] = {}
    for name, seconds in times.items():
        first = name.split("-")[0]
        kind = {"store": "recording", "test": "measuring", "validation": "measuring", "long": "measuring"}.get(first)
        if kind:
            kinds[kind] = kinds.get(kind, 0.0) + seconds / 60
    for path in sorted((plan.out / "runs").glob(f"*/{CONFIG}")):
        (one,) = load([path.parent])
        kinds[one.learner] = kinds.get(one.learner, 0.0) + one.seconds / 60
    return {kind: round(value, 1) for kind, value in sorted(kinds.items())}


def show(claims: Sequence[Claim], console: Console) -> None:
    """Print the claims."""
    for claim in claims:
        table = Table(title=f"{claim.name}: {claim.says}", caption=claim.note or None, box=box.SIMPLE, padding=(0, 1))
        for heading in claim.headings:
            table.add_column(heading)
        for line in claim.table:
            table.add_row(*map(str, line))
        console.print(table)


def reproduce(args: Args, command: str) -> None:
    """Do what isn't done, and write the page; ``command`` is what it says that it was made with."""
    plan, console = Plan(args.out, args.size), wide_console()
    plan.carry_out(args.processes)
    claims = judge(plan)
    made = {
        "command": command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "trained_at": plan.commits(),
        "size": asdict(args.size),
        "minutes": minutes(plan, plan.times()),
    }
    # Imported here: matplotlib takes a second, and bad arguments shall not wait for it.
    from experiments.plots import plot_curves

    plot_curves(learning_curves(plan), args.out / "learning.png", "million tokens decoded in training")
    write_atomic(
        args.out / "claims.json", json.dumps({**made, "claims": [asdict(claim) for claim in claims]}, indent=1) + "\n"
    )
    write_atomic(args.out / "claims.md", markdown(claims, plan, made))
    show(claims, console)
    if args.ship:
        ship(plan, made)
    console.print(f"claims: {args.out / 'claims.md'}\ncurves: {args.out / 'learning.png'}", soft_wrap=True)
