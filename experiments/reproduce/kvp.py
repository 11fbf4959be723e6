"""``python -m experiments.reproduce kvp``: the figures of KVP's paper (arXiv 2602.10238) beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from experiments.comparison import bootstrap
from experiments.reproduce.figures import KVP
from experiments.reproduce.kvp_study import ATTENTION, DIALOGUE, FREE, OBJECTIVES, SYNTHETIC, KVPStudy, Size
from experiments.reproduce.overhead import overhead
from experiments.reproduce.page import (
    NONE,
    NOT,
    SAME,
    Element,
    Line,
    OnGPU,
    Page,
    claimed_means,
    committed_claims,
    direction,
    publish,
    shown,
)
from experiments.reproduce.rank_costs import ORACLE
from experiments.reproduce.study import FAMILIES
from experiments.reproduce.verdicts import Measured

COMMAND = "python -m experiments.reproduce kvp"
AGENT = "kvp-tiny"


@dataclass
class Args:
    """Measure what has a counterpart in KVP's paper, and put the two side by side."""

    out: Path = Path("runs/kvp-paper")
    """Directory for stores, trainings, rows, and kvp.md and kvp.json; a second call goes on there."""
    processes: int = 2
    """Jobs at a time, each on one thread."""
    ship: bool = False
    """Write the page into experiments/results of this checkout, too."""
    size: tyro.conf.OmitArgPrefixes[Size] = field(default_factory=Size)


def against_attention_free() -> Element:
    """Return what the claims say of KVP against heuristics that see no attention."""
    claims, command = committed_claims()
    lines = []
    for family, budget, own, best, change, beats in claims["KVP sees no attention"]["table"]:
        verdict = {"yes": SAME, "saturated": f"{NONE}: saturated"}.get(beats)
        verdict = verdict or f"{NOT}: level with, or behind, {beats.removeprefix('not ')}"
        lines.append(Line(f"{family}, budget {budget}", "best", f"{own} minus {best}: {change}", verdict))
    return Element(
        "KVP among methods that see no attention", KVP["quality"],
        "kvp on the bundled LLM, evictions every 16 tokens, answer loss on 200 test traces of each family, five "
        "training seeds; beside the best of random, random-prompt, streaming, knorm, keydiff and lagkv; same "
        "direction where it beats every one.",
        command, lines,
    )  # fmt: skip


def against_attention(measured: Measured, size: Size) -> Element:
    """Return how KVP stands beside heuristics that see attention."""
    lines = []
    for name in ATTENTION:
        change = measured.change((AGENT, size.budget), (name, size.budget), FAMILIES)
        verdict = direction(change, -1) if name in ("tova", "snapkv") else NONE
        lines.append(
            Line(f"{AGENT} minus {name}", "often better" if verdict != NONE else "-", shown(change, "+.3f"), verdict)
        )
    means, (_, command) = claimed_means(), committed_claims()
    cells = list(means["kvp"])
    behind = [cell for cell in cells if min(means[name][cell] for name in ATTENTION) <= means["kvp"][cell]]
    note = (
        f"By the means of `{command}`, kvp has a lower answer loss than all five in {len(cells) - len(behind)} of "
        f"{len(cells)} cells of family and budget" + (f", not in {', '.join(behind)}." if behind else ".")
    )
    return Element(
        "KVP beside methods that see attention", KVP["attention"],
        f"{AGENT}, answer loss at budget {size.budget}, {size.num_traces} test traces of each family.",
        COMMAND, lines, note,
    )  # fmt: skip


def reward_validity(costs: Mapping[str, np.ndarray], size: Size) -> list[Element]:
    """Return what rankings cost beside the oracle's, and how that differs from head to head."""
    seeing = [float(_cost(costs[name]).mean()) for name in ATTENTION]
    own = float(_cost(costs[AGENT]).mean())
    lines = []
    for name in (ORACLE, AGENT, *ATTENTION, *FREE, "random"):
        by_max = bootstrap(costs[name][..., 0].mean(axis=(1, 2))[:, None])
        lost = costs[name][..., 2:].mean(axis=(0, 1, 2))
        ours = f"{shown(bootstrap(_cost(costs[name])))}; by the largest {shown(by_max)}; lost " + ", ".join(
            f"{share:.0%} at {budget}" for share, budget in zip(lost, size.cost_budgets)
        )
        paper, verdict = ("among those", SAME if own <= max(seeing) else NOT) if name == AGENT else ("-", NONE)
        lines.append(Line(name, paper, ours, verdict))
    where = (
        f"{size.cost_traces} test traces of each family, cut at {', '.join(map(str, size.cuts))} tokens: cost of "
        "ranking all pairs but the first 4 and the newest 16, over the oracle's ranking by the sum of future "
        "attention (KVRank-v0's reward, negative, over the pairs that aren't protected)"
    )
    heads = []
    for name in (AGENT, *ATTENTION, *FREE, "random"):
        by_head = costs[name][..., 1].mean(axis=0).ravel()
        chance = costs["random"][..., 1].mean(axis=0).ravel()
        worse = int((by_head > chance).sum())
        ours = f"{by_head.min():.2f} to {by_head.max():.2f}; worse than random on {worse} of {by_head.size}"
        paper = {"streaming": "good on some, bad on others", "keydiff": "fails on one"}.get(name, "-")
        found = 0 < worse < by_head.size if name == "streaming" else worse > 0
        heads.append(Line(name, paper, ours, NONE if paper == "-" else SAME if found else NOT))
    return [
        Element(
            "What rankings cost", KVP["cost"],
            f"{where}, means over heads; the same by the largest mean attention of a window, which kvp is trained "
            "on; and the share of future attention that goes at each budget.",
            COMMAND, lines,
            "The verdict is that KVP costs no more than the worst of the methods that see attention.",
        ),
        Element(
            "Heads differ", KVP["heads"], "the same costs by head, lowest to highest.", COMMAND, heads,
            "A head fails here if its ranking costs more than a random one.",
        ),
    ]  # fmt: skip


def objectives(measured: Measured, costs: Mapping[str, np.ndarray], size: Size) -> Element:
    """Return what the same network learns from other objectives."""
    lines, base, chance = [], "reinforce", _cost(costs["random"])
    for name in OBJECTIVES:
        cost = _cost(costs[name])
        loss = measured.change((name, size.budget), (base, size.budget), FAMILIES)
        change = bootstrap(cost - _cost(costs[base]))
        beside = f", minus {base} {shown(change, '+.3f')}; answer loss minus its {shown(loss, '+.3f')}"
        if name == base:
            beside = f"; answer loss {shown(bootstrap(_pooled(measured, name, size.budget)))}"
        learns = bootstrap(cost - chance).high < 0
        if name.startswith(base):
            paper, verdict = "learns", SAME if learns else NOT
        elif name.startswith("soft-rank"):
            paper, verdict = "fails", f"{NOT}: it learns" if learns else SAME
        else:
            paper, verdict = "-", NONE + (": it learns" if learns else ": it fails")
        lines.append(Line(name, paper, f"cost {shown(bootstrap(cost))}{beside}", verdict))
    return Element(
        "RL against supervised learning", KVP["objectives"],
        f"the same network, {size.store_traces} recorded traces, {size.updates} updates of 8, one seed; cost as "
        f"above, and answer loss at budget {size.budget} minus that of reinforce (kvp's defaults: utilities to the "
        "third power, picks paid for the budgets that they decide). `reinforce, paper` pays whole rankings, and has "
        "utilities as they are, as `regression, power 1` has; `cost` is the expectation of reinforce's reward in "
        "closed form. Step sizes of soft ranks are factors of kvp's, 2e-3; their regularisation is 1, targets are "
        "ranks over the number of pairs.",
        COMMAND, lines,
        f"Random rankings cost {_cost(costs['random']).mean():.3f}. Failing is to do no better. Cost is over "
        "all budgets and pairs, answer loss at one budget and of the pairs that answers need: they needn't rank alike.",
    )  # fmt: skip


def transfer(measured: Measured, size: Size) -> Element:
    """Return how policies trained on one kind of traces do on the other."""
    lines = []
    for families, label, home, away in (
        (("recall", "tracking"), "recall and tracking", SYNTHETIC, DIALOGUE),
        (("dialogue",), "dialogue", DIALOGUE, SYNTHETIC),
        (("reasoning",), "reasoning", SYNTHETIC, DIALOGUE),
    ):
        change = measured.change((home, size.budget), (away, size.budget), families)
        known = label != "reasoning"
        lines.append(
            Line(
                f"{label}: {home} minus {away}", "better on its own kind" if known else "-", shown(change, "+.3f"),
                direction(change, -1) if known else NONE,
            )
        )  # fmt: skip
    return Element(
        "Transfer between kinds of traces", KVP["transfer"],
        f"kvp trained on recall and tracking ({SYNTHETIC}) and on dialogue ({DIALOGUE}), {size.store_traces} "
        f"recorded traces and {size.updates} updates each, one seed; answer loss at budget {size.budget}, "
        f"{size.num_traces} test traces of each family.",
        COMMAND, lines,
    )  # fmt: skip


def longer_traces() -> Element:
    """Return what the claims say of traces longer than those trained on."""
    claims, command = committed_claims()
    table = claims["KVP transfers"]
    long = {row[0]: [float(loss) for loss in row[2:]] for row in table["table"] if row[1] == "1024"}
    free = [name for name in long if name not in ("full", "golden", "kvp", "kvp-short")]
    lines = []
    for column, family in enumerate(table["headings"][2:]):
        best = min(free, key=lambda name: long[name][column])
        for name, length in (("kvp", 512), ("kvp-short", 256)):
            verdict = f"{NONE}: {'ahead' if long[name][column] < long[best][column] else 'behind'}"
            ours = f"{long[name][column]:.3f} against {best} {long[best][column]:.3f}"
            lines.append(Line(f"{family}: trained on {length} tokens", "-", ours, verdict))
    return Element(
        "Longer traces", KVP["length"],
        "traces of 1,024 tokens at budget 64, 50 of each family, answer loss beside the best heuristic that sees no "
        "attention; means without intervals.",
        command, lines,
    )  # fmt: skip


def overheads() -> Element:
    """Return what scoring costs."""
    figure = KVP["overhead"]
    paper = figure.values["scoring"] / figure.values["LLM"]
    lines = []
    for name, label in (
        ("Qwen2.5-7B", "Qwen2.5-7B's shape, the paper's widths"),
        ("tiny", "bundled LLM, kvp's defaults"),
    ):
        of = overhead(name)
        ours = (
            f"{of.agents} agents, {of.parameters / 1e6:.2f} M parameters, {of.scoring:.4f} of {of.decoding:.4f} "
            f"GFLOPs per token = {of.scoring / of.decoding:.1%}"
        )
        known = name != "tiny"
        shown_paper = f"112 agents, 72.8 M parameters, 0.15 of 14.00 GFLOPs = {paper:.1%}" if known else "-"
        same = of.scoring / of.decoding <= paper
        lines.append(Line(label, shown_paper, ours, (SAME if same else NOT) if known else NONE))
    return Element(
        "Overhead", figure,
        "counted from the modules, two operations per weight of a matrix and token, attention left out.",
        COMMAND, lines,
        "The paper's 0.15 GFLOPs are about two operations for each of its 72.8 M parameters, a table of positions "
        "among them that is looked up, not multiplied; our scorer has smooth functions of the position instead. The "
        "bundled LLM is small, its scorers aren't in proportion.",
    )  # fmt: skip


def on_gpu() -> list[OnGPU]:
    """Return what needs a real model."""
    qwen = "--model Qwen/Qwen2.5-7B-Instruct --device cuda --dtype bfloat16"
    training = [
        "# TRACES.jsonl: RULER prompts of 4,096 tokens with the model's answers; 0.25 GB a trace, the paper has 6,000",
        f"kvenv record {qwen} --traces TRACES.jsonl --trace-length 4396 --interval 256 --utility sum --num-traces 500 "
        "--batch-size 1 --out runs/qwen-store",
        f"kvenv train kvp {qwen} --store runs/qwen-store --preset kvp --batch-size 16 --eval-every 0 --out "
        "runs/qwen-kvp",
    ]
    policies = "--policies full runs/qwen-kvp/policy random streaming knorm keydiff lagkv tova snapkv"
    terms = f"{qwen} {policies} --budgets 256 512 1024 2048 --task-data DIR"
    others = "zeroshot/arc_challenge zeroshot/hellaswag zeroshot/mmlu zeroshot/gov_report"
    return [
        OnGPU(
            "RULER accuracy", KVP["quality"],
            [*training, f"kvenv evaluate --tasks ruler {terms} --trace-length 4096 --out runs/ruler"],
        ),
        OnGPU(
            "Perplexity on OASST2", KVP["attention"],
            [f"kvenv evaluate --tasks perplexity/dialogue {terms} --trace-length 4096 --out runs/perplexity"],
        ),
        OnGPU(
            "Transfer to other tasks", KVP["transfer"],
            [
                f"kvenv evaluate --tasks zeroshot/boolq {terms} --trace-length 4096 --question held-out "
                "--out runs/boolq",
                f"kvenv evaluate --tasks {others} {terms} --trace-length 8192 --out runs/zeroshot",
            ],
        ),
        OnGPU("Latency", KVP["latency"], ["python -m experiments.bench gpu --device cuda"]),
    ]  # fmt: skip


def page(study: KVPStudy) -> Page:
    """Return the page of what was measured."""
    size, test, costs = study.size, Measured(study.rows("test")), study.costs()
    return Page(
        "KVP: the paper's figures beside ours",
        "The paper (arXiv 2602.10238) compresses the prompts of Qwen2.5-7B and Phi-4 once; ours are the bundled LLM "
        "and its synthetic traces, evicted every 16 tokens, so that directions can be compared, not numbers. One "
        "training seed unless said otherwise; intervals are 95 %, over traces.",
        [
            against_attention_free(),
            against_attention(test, size),
            *reward_validity(costs, size),
            objectives(test, costs, size),
            transfer(test, size),
            longer_traces(),
            overheads(),
        ],
        on_gpu(),
    )


def reproduce(args: Args, command: str) -> None:
    """Do what isn't done, and write the page; ``command`` is what it says that it was made with."""
    publish("kvp", KVPStudy(args.out, args.size), page, args, command)


def _cost(values: np.ndarray) -> np.ndarray:
    """Return costs (traces, 1) by the sum of future attention, means over heads."""
    return values[..., 1].mean(axis=(1, 2))[:, None]


def _pooled(measured: Measured, policy: str, budget: int) -> np.ndarray:
    """Return the answer losses (traces, seeds) of all families."""
    return np.concatenate([measured.common([(family, policy, budget)])[0] for family in FAMILIES])
