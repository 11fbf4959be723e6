"""``python -m experiments.reproduce foresightkv``: ForesightKV's figures (arXiv 2602.03203) beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from experiments.comparison import Estimate, bootstrap
from experiments.reproduce.figures import FORESIGHTKV, Figure
from experiments.reproduce.foresight_study import FEATURES, REWARDS, RIVALS, SAMPLERS, START, ForesightStudy, Size
from experiments.reproduce.page import (
    NONE,
    NOT,
    SAME,
    Element,
    Line,
    OnGPU,
    Page,
    claimed_means,
    committed,
    committed_claims,
    direction,
    publish,
    ratio,
    shown,
)
from experiments.reproduce.study import FAMILIES
from experiments.reproduce.verdicts import Measured
from kvenv.rewards import LOW_ENTROPY_SHARE

COMMAND = "python -m experiments.reproduce foresightkv"
MATH = "reasoning"
"""The family that stands for the paper's mathematics."""
INTERVAL = 16
"""W; the paper's is 256, and its budgets 16 times ours."""


@dataclass
class Args:
    """Measure what has a counterpart in ForesightKV's paper, and put the two side by side."""

    out: Path = Path("runs/foresightkv")
    """Directory for trainings, rows, and foresightkv.md and foresightkv.json; a second call goes on there."""
    processes: int = 2
    """Jobs at a time, each on one thread."""
    ship: bool = False
    """Write the page into experiments/results of this checkout, too."""
    size: tyro.conf.OmitArgPrefixes[Size] = field(default_factory=Size)


def oracle(measured: Measured, budget: int, figure: Figure) -> Element:
    """Return how much golden and the heuristics lose at a budget."""
    loss = {name: _losses(measured, [MATH], name, budget) for name in RIVALS}
    full = _losses(measured, [MATH], RIVALS[0], budget, "full_lm_loss")
    everywhere = _losses(measured, FAMILIES, RIVALS[0], budget, "full_lm_loss")
    lines = []
    for name in RIVALS:
        if name not in figure.values:
            verdict = NONE
        elif name == "golden":
            verdict = SAME if min(figure.values, key=lambda other: loss[other].mean()) == name else NOT
        else:
            verdict = direction(bootstrap((loss[name] - loss["golden"])[:, None]), 1)
        whole = ratio(_losses(measured, FAMILIES, name, budget), everywhere)
        paper = f"{figure.values[name]:.4f}" if name in figure.values else "-"
        lines.append(Line(name, paper, f"{shown(ratio(loss[name], full))}; all families {shown(whole)}", verdict))
    theirs, ours = _order(figure.values), _order({name: float(loss[name].mean()) for name in figure.values})
    lines.append(Line("order", theirs, ours, SAME if theirs == ours else NOT))
    return Element(
        f"Golden Eviction and heuristics, B / W = {budget // INTERVAL}", figure,
        f"bundled LLM, test traces of 512 tokens of the family {MATH}, and of all four; B = {budget}, W = {INTERVAL}; "
        "LM loss over the full cache's, over the same targets. A heuristic's verdict is that it loses more than golden "
        f"on {MATH}.",
        COMMAND, lines,
    )  # fmt: skip


def motivation(measured: Measured, full: Mapping[str, Sequence[Sequence[float]]], budget: int) -> Element:
    """Return by how much losses rise of tokens with little entropy, and of the others."""
    lines = []
    for families, label in (([MATH], MATH), (FAMILIES, "all families")):
        for name in RIVALS:
            low, high = _rises(measured, full, families, name, budget)
            apart = low.low > high.high or low.high < high.low
            verdict = SAME if low.low > high.high else f"{NOT}: the opposite" if apart else f"{NOT}: overlapping"
            lines.append(Line(f"{name}, {label}", "147% / 52%", f"{shown(low, '.0%')} / {shown(high, '.0%')}", verdict))
    return Element(
        "Low-entropy tokens suffer most", FORESIGHTKV["entropy"],
        f"the same traces at B = {budget}: rise of the mean loss over the full cache's mean loss of the same targets, "
        "low / high entropy; same direction where the intervals don't overlap.",
        COMMAND, lines,
        "A token with little entropy has little loss, so that a relative rise of it is large by itself.",
    )  # fmt: skip


def _rises(
    measured: Measured, full: Mapping[str, Sequence[Sequence[float]]], families: Sequence[str], name: str, budget: int
) -> tuple[Estimate, Estimate]:
    """Return the relative loss increases of low- and of high-entropy tokens."""

    def of(metric: str) -> np.ndarray:
        return _losses(measured, families, name, budget, metric)

    tokens, of_low = of("scored_tokens"), of("low_entropy_increase")
    few = np.maximum(1, (LOW_ENTROPY_SHARE * tokens).astype(int))
    of_high = ((of("lm_loss") - of("full_lm_loss")) * tokens - of_low * few) / (tokens - few)
    low, high = np.array([means for family in families for means in full[family]]).T
    return ratio(of_low, low), ratio(of_high, high)


def rewards(measured: Measured, size: Size) -> Element:
    """Return what RL with each reward changes."""
    figure, start = FORESIGHTKV["rewards"], (START, size.budget)
    lines = [Line("supervised only", f"{figure.values['supervised']}", _state(measured, START, size.budget), NONE)]
    gained = {"supervised": 0.0}
    for name in REWARDS:
        one = (f"reward-{name}", size.budget)
        accuracy, loss, rise = (
            measured.change(one, start, FAMILIES, metric)
            for metric in ("answer_accuracy", "answer_loss", "low_entropy_increase")
        )
        gained[name] = accuracy.mean
        gain = figure.values[name] - figure.values["supervised"]
        ours = "; ".join(
            (
                f"accuracy {shown(accuracy, '+.1%')}",
                f"answer loss {shown(loss, '+.3f')}",
                f"low-entropy rise {shown(rise, '+.4f')}",
            )
        )
        verdict = direction(accuracy, 1 if gain > 0 else -1)
        lines.append(Line(_REWARD_NAMES[name], f"{figure.values[name]} ({gain:+.1f})", ours, verdict))
    theirs, ours = (_order(of) for of in (figure.values, gained))
    lines.append(Line("order by accuracy, worst first", theirs, ours, SAME if theirs == ours else NOT))
    return Element(
        "Rewards", figure,
        f"GRPO from {START}, {size.updates[0]} updates of {size.batch[0]} traces x 8 rollouts at budget "
        f"{size.budget}, one seed, credit by attention (kvenv's default); {size.num_traces} test traces of each "
        "family, each reward's policy minus the supervised one. Intervals are over traces; another training seed "
        "isn't in them. The verdict is that of accuracy.",
        COMMAND, lines,
        "The paper credits every pick with its whole trajectory. At this scale that moves next to nothing, with the "
        "loss of all tokens or the paper's reward: `python -m experiments.ablation grpo`, grpo.md.",
    )  # fmt: skip


def features(measured: Measured, size: Size) -> Element:
    """Return what a scorer loses that sees less."""
    paper, *others = FEATURES
    base = (f"features-{paper}", size.budget)
    lines = [Line(f"{paper}: key, value, attention statistics", "-", _state(measured, base[0], size.budget), NONE)]
    for name in others:
        change = measured.change((f"features-{name}", size.budget), base, FAMILIES)
        says, verdict = ("worse", direction(change, 1)) if name == "attention-only" else ("-", NONE)
        lines.append(Line(f"{name} minus {paper}", says, f"answer loss {shown(change, '+.3f')}", verdict))
    there = committed("imitation")["rows"]
    mean = {
        name: float(np.mean([there[f"{name} (seed 0)"][family]["answer_loss"] for family in FAMILIES]))
        for name in ("foresight", "kv", "pre-rope")
    }
    return Element(
        "Features", FORESIGHTKV["features"],
        f"imitation of Golden Eviction, {size.updates[1]} updates of {size.batch[1]} traces at budget {size.budget}, "
        f"one seed, by what the scorer sees; {size.num_traces} test traces of each family.",
        COMMAND, lines,
        "Answer loss in `python -m experiments.ablation imitation --updates 24` (imitation.md, 16 validation traces of "
        "each family): " + ", ".join(f"{name} {value:.2f}" for name, value in mean.items()) + ".",
    )  # fmt: skip


def half_budget() -> Element:
    """Return what the claims say of half the budget."""
    claims, command = committed_claims()
    claim = claims["Half the budget"]
    lines = [
        Line(
            f"{family}, {int(budget) // 2} against {budget}", "better",
            f"{learned} minus {best}: {change}, accuracy lost {lost}",
            SAME if holds == "yes" else NOT if holds == "no" else f"{NONE}: {holds}",
        )
        for family, budget, best, learned, change, lost, _, holds in claim["table"]
    ]  # fmt: skip
    return Element(
        "Half the budget", FORESIGHTKV["half"],
        "the best learned policy at half of a budget against the best heuristic at all of it, both chosen on "
        "validation traces; answer loss on 200 test traces of each family, five training seeds; same direction "
        "where it is no worse.",
        command, lines,
    )  # fmt: skip


def reinforcement() -> Element:
    """Return what the claims say of RL after supervised learning."""
    claims, command = committed_claims()
    figure, means = FORESIGHTKV["rl"], claimed_means()
    paper = " → ".join(f"{value}" for value in figure.values.values())
    lines = []
    for budget, before, change, share, lm, _ in claims["RL adds to SL"]["table"]:
        better = all(float(text.split(", ")[1].rstrip("]")) < 0 for text in (change, lm))
        ours = f"low-entropy rise {before}, {change} ({share} of it); LM loss {lm}"
        lines.append(Line(f"LM loss at budget {budget}", paper, ours, SAME if better else NOT))
        supervised, trained = (
            float(np.mean([means[name][f"{family} {budget}"] for family in FAMILIES])) for name in ("imitation", "grpo")
        )
        verdict = SAME if trained < supervised else NOT
        lines.append(
            Line(f"answers at budget {budget}", paper, f"answer loss {supervised:.3f} → {trained:.3f}", verdict)
        )
    return Element(
        "RL after supervised learning", figure,
        "imitation, 96 updates, and 60 of GRPO from there; five training seeds, 200 test traces of each family. "
        "Means of answer loss over families have no interval there.",
        command, lines,
    )  # fmt: skip


def samplers(measured: Measured, size: Size) -> Element:
    """Return what drawing evictions at test time changes."""
    start = (START, size.budget)
    lines = [Line("the W that score lowest", "worse", _state(measured, START, size.budget), NONE)]
    for name in SAMPLERS:
        pool, temperature = name.split("-")
        change = measured.change((name, size.budget), start, FAMILIES)
        what = "all candidates" if pool == "all" else "the 2 W that score lowest"
        lines.append(
            Line(
                f"drawn from {what}, temperature {temperature}", "worse" if pool == "all" else "best",
                f"answer loss {shown(change, '+.3f')} to the lowest W",
                NONE if pool == "all" else direction(change, -1),
            )
        )  # fmt: skip
        if pool == "pool":
            other = (f"all-{temperature}", size.budget)
            change = measured.change((name, size.budget), other, FAMILIES)
            ours = f"answer loss {shown(change, '+.3f')}"
            lines.append(Line(f"pool minus all, temperature {temperature}", "better", ours, direction(change, -1)))
    return Element(
        "Sampling evictions at test", FORESIGHTKV["sampler"],
        f"{START} at budget {size.budget}; 0.3 is the temperature of GRPO's rollouts, at which hardly any draw "
        f"leaves the pool, at 10 some do; {size.num_traces} test traces of each family, seeds of the noise "
        f"{', '.join(map(str, size.noise_seeds))}.",
        COMMAND, lines,
    )  # fmt: skip


_REWARD_NAMES = {
    "all": "loss of all tokens",
    "low": "loss of low-entropy tokens",
    "high": "loss of high-entropy tokens",
    "large": "increases beyond 1.5 nats of low-entropy tokens",
    "squared": "their squares (the paper's)",
}


def on_gpu() -> list[OnGPU]:
    """Return what needs a real model."""
    qwen = "--model Qwen/Qwen3-4B --device cuda --dtype bfloat16"
    terms = "--interval 256 --budgets 1024 2048"
    traces = "--traces TRACES.jsonl --trace-length 16384"
    rivals = "--policies full golden h2o snapkv r-kv random"
    training = f"{qwen} {traces} --recent 256 {terms} --preset foresightkv --eval-every 0"
    return [
        OnGPU(
            "Accuracy on AIME by budget", FORESIGHTKV["aime"],
            [
                "# TRACES.jsonl: correct long answers of the model to problems of other years",
                f"kvenv train grpo {training} --at-once 4 --out runs/qwen-grpo",
                f"kvenv evaluate --tasks reasoning {qwen} --policies full runs/qwen-grpo/policy r-kv snapkv h2o random "
                "--interval 256 --budgets 1024 2048 4096 --trace-length 32768 --temperature 0.6 --top-p 0.95 "
                "--seeds 0 1 2 3 4 5 6 7 --task-data DIR --out runs/reasoning",
            ],
        ),
        OnGPU(
            "LM loss of Golden Eviction and the heuristics", FORESIGHTKV["oracle 1024"],
            [f"kvenv evaluate {qwen} {traces} {rivals} {terms} --batch-size 1 --out runs/oracle"],
        ),
        OnGPU(
            "Loss by entropy", FORESIGHTKV["entropy"],
            [
                f"kvenv evaluate --tasks entropy {qwen} {rivals} {terms} --trace-length 16384 --task-data DIR "
                "--out runs/entropy"
            ],
        ),
        OnGPU("Throughput", FORESIGHTKV["throughput"], ["python -m experiments.bench gpu --device cuda"]),
    ]  # fmt: skip


def page(study: ForesightStudy) -> Page:
    """Return the page of what was measured."""
    size, test = study.size, Measured(study.rows("test"))
    heuristics = Measured(study.rows("oracle"))
    return Page(
        "ForesightKV: the paper's figures beside ours",
        "The paper (arXiv 2602.03203) has real models and mathematics; ours are the bundled LLM and its synthetic "
        "traces, so that directions can be compared, not numbers. Sections of the paper are named by content: its "
        "full text was not at hand. One training seed unless said otherwise; intervals are 95 %, over traces.",
        [
            *(oracle(heuristics, budget, FORESIGHTKV[f"oracle {INTERVAL * budget}"]) for budget in size.budgets),
            motivation(heuristics, study.full(), size.budgets[0]),
            rewards(test, size),
            half_budget(),
            features(test, size),
            reinforcement(),
            samplers(test, size),
        ],
        on_gpu(),
    )


def reproduce(args: Args, command: str) -> None:
    """Do what isn't done, and write the page; ``command`` is what it says that it was made with."""
    publish("foresightkv", ForesightStudy(args.out, args.size), page, args, command)


def _order(of: Mapping[str, float]) -> str:
    """Return names by their values, the smallest first."""
    return " < ".join(sorted(of, key=lambda name: of[name]))


def _losses(
    measured: Measured, families: Sequence[str], policy: str, budget: int, metric: str = "lm_loss"
) -> np.ndarray:
    """Return a metric (traces,) over the traces of some families, means over seeds."""
    return np.concatenate([measured.values(family, policy, budget, metric).mean(axis=1) for family in families])


def _state(measured: Measured, policy: str, budget: int) -> str:
    """Return a policy's accuracy and answer loss over all families."""
    values: list[Estimate] = []
    for metric in ("answer_accuracy", "answer_loss"):
        cells = [measured.common([(family, policy, budget)], metric)[0] for family in FAMILIES]
        values.append(bootstrap(np.concatenate(cells)))
    return f"accuracy {shown(values[0], '.1%')}; answer loss {shown(values[1])}"
