"""The two papers' pages: figures with provenance, the arithmetic of constructed rows, and both commands as a whole."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from transformers import PreTrainedModel

import agents
from agents.knorm import KNorm
from agents.scorer import ScorerPolicy
from experiments import evaluate, reproduce, train
from experiments import record as record_command
from experiments.comparison import Estimate
from experiments.jobs import Job
from experiments.reproduce import foresight_study, foresightkv, kvp, page, study
from experiments.reproduce.figures import FORESIGHTKV, KVP, SOURCES, Figure
from experiments.reproduce.overhead import overhead
from experiments.reproduce.page import NONE, NOT, SAME, Element, Line, OnGPU, Page, direction, ratio
from experiments.reproduce.rank_costs import ORACLE, rank_costs
from experiments.reproduce.study import FAMILIES
from experiments.reproduce.verdicts import Measured
from kvenv.evaluation import Row
from kvenv.layerwise import rollout
from kvenv.models import load_model
from kvenv.recording import record
from kvenv.rewards import FullLosses, WindowLosses
from kvenv.state import LayerState
from kvenv.tasks import TASKS
from kvenv.traces import load_traces
from tests.policies import kvenv_model, random_traces
from tests.test_reproduce import ROW


def test_every_figure_says_how_it_is_known() -> None:
    for name, figure in (*FORESIGHTKV.items(), *KVP.items()):
        assert figure.source in SOURCES, name
        assert figure.values or figure.says, name
        # What others noted about AIME contradicts itself: no such number stands without saying so.
        assert "AIME" not in figure.setting or figure.doubt, name


def test_a_ratio_of_means_is_that_and_not_a_mean_of_ratios() -> None:
    above, below = np.array([2.0, 6.0]), np.array([1.0, 2.0])
    found = ratio(above, below)
    assert found.mean == pytest.approx(8 / 3)
    assert (found.low, found.high) == pytest.approx((2.0, 3.0)), "resampling two traces draws either one alone"


@pytest.mark.parametrize(
    ("low", "high", "expected", "verdict"),
    [(0.1, 0.3, 1, SAME), (0.1, 0.3, -1, f"{NOT}: the opposite"), (-0.1, 0.3, 1, f"{NOT}: no difference found")],
)
def test_a_direction_needs_an_interval_without_0(low: float, high: float, expected: int, verdict: str) -> None:
    assert direction(Estimate((low + high) / 2, low, high, high), expected) == verdict


def rows(policy: str, budget: int, families: tuple[str, ...] = FAMILIES, **values: float) -> list[Row]:
    """Return rows of 20 traces, which differ a little, alike for all policies."""
    noise = np.random.default_rng(0).normal(size=20) / 100
    noise -= noise.mean()
    made = replace(ROW, policy=policy, budget=budget, scored_tokens=10, full_lm_loss=2.0)
    return [
        replace(made, traces=family, trace=i, **{name: value + noise[i] for name, value in values.items()})
        for family in families
        for i in range(20)
    ]


def losses(**by_policy: float) -> Measured:
    """Return rows of the rivals with these LM losses."""
    given = dict.fromkeys(foresight_study.RIVALS, 3.0) | {name.replace("_", "-"): x for name, x in by_policy.items()}
    return Measured([row for name, loss in given.items() for row in rows(name, 64, lm_loss=loss)])


def test_golden_must_lose_least_and_heuristics_more() -> None:
    element = foresightkv.oracle(losses(golden=2.2, h2o=2.4, snapkv=2.6, r_kv=2.8), 64, FORESIGHTKV["oracle 1024"])
    lines = {line.what: line for line in element.lines}
    assert lines["golden"].ours.startswith("1.100 [")
    assert {lines[name].verdict for name in ("golden", "h2o", "snapkv", "r-kv", "order")} == {SAME}
    assert lines["random"].verdict == NONE
    element = foresightkv.oracle(losses(golden=2.2, h2o=2.1), 64, FORESIGHTKV["oracle 1024"])
    other = {line.what: line for line in element.lines}
    assert (other["golden"].verdict, other["h2o"].verdict) == (NOT, f"{NOT}: the opposite")
    assert other["order"].verdict == NOT


def test_rises_of_low_and_high_entropy_add_up_to_the_whole() -> None:
    # Of 10 tokens 8 have little entropy: 0.5 nats, and rise by 0.4; the others have 8 nats, and rise by 1.
    whole = (8 * 0.4 + 2 * 1.0) / 10
    given = {name: rows(name, 64, lm_loss=2.0 + whole, low_entropy_increase=0.4) for name in foresight_study.RIVALS}
    same = [replace(row, low_entropy_increase=0.4, lm_loss=2.0 + whole) for made in given.values() for row in made]
    full = {family: [[0.5, 8.0]] * 20 for family in FAMILIES}
    line = foresightkv.motivation(Measured(same), full, 64).lines[0]
    assert line.ours == "80% [80%, 80%] / 12% [12%, 12%]"
    assert line.verdict == SAME


def test_a_reward_is_judged_by_accuracy_and_by_the_papers_sign() -> None:
    size = foresight_study.Size()
    start = rows(foresight_study.START, size.budget, answer_accuracy=0.5)
    gains = {"all": -0.1, "low": 0.1, "high": 0.1, "large": 0.0, "squared": 0.1}
    made = [row for name, x in gains.items() for row in rows(f"reward-{name}", size.budget, answer_accuracy=0.5 + x)]
    element = foresightkv.rewards(Measured([*start, *made]), size)
    expected = [NONE, SAME, SAME, f"{NOT}: the opposite", f"{NOT}: no difference found", SAME, NOT]
    assert [line.verdict for line in element.lines] == expected
    assert element.lines[1].paper == "50.6 (-1.1)"


def test_the_rewards_of_the_ablation_are_their_formulas() -> None:
    nll, full = torch.tensor([[1.0, 5.0, 3.0, 0.0]]), torch.tensor([[0.5, 1.0, 1.0, 0.0]])
    low = torch.tensor([[True, True, False, False]])
    valid = torch.tensor([[True, True, True, False]])
    known = FullLosses(full, full, low, torch.tensor([2]))
    window = WindowLosses(nll, nll, valid, valid, valid, torch.zeros(1, 4, dtype=torch.int64), 4, lambda: known)
    assert float(foresight_study.low_entropy_loss(window)) == -6 / 4
    assert float(foresight_study.high_entropy_loss(window)) == -3 / 4
    assert float(foresight_study.low_entropy_spikes(window)) == -4 / 4


def test_a_pool_holds_the_2_w_that_score_lowest() -> None:
    loaded = load_model("tiny")
    start = agents.make(foresight_study.START)
    beyond: dict[str, int] = {}
    for name in ("all-1000", "pool-1000"):
        beyond[name] = 0

        def look(state: LayerState, order: torch.Tensor, count: torch.Tensor, name: str = name) -> None:
            assert isinstance(start, ScorerPolicy)
            rank = start(replace(state, encoded=None)).masked_fill(~state.mask, torch.inf).argsort(-1).argsort(-1)
            went = torch.arange(16) < count[..., None]
            beyond[name] += int(((rank.gather(-1, order[..., :16]) >= 32) & went).sum())

        traces = load_traces("recall", split="validation", tokenizer=loaded.tokenizer, trace_length=160)
        sampler = foresight_study.sampler(name)
        rollout(sampler, [traces[0]], model=loaded.model, budget=64, interval=16, on_eviction=look)
    assert beyond["pool-1000"] == 0 < beyond["all-1000"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Return a random model."""
    return kvenv_model()


def test_costs_of_rankings_are_those_of_recorded_traces(model: PreTrainedModel) -> None:
    # KNorm needs the keys only: its costs follow from a trace store, here pair by pair.
    traces, cuts, budgets = random_traces([70, 80]), (36, 48), (12, 30)
    found = rank_costs({"knorm": KNorm()}, traces, model=model, cuts=cuts, budgets=budgets, interval=6)
    stored = {reduce: record(model, traces, 6, reduce) for reduce in ("max", "sum")}  # type: ignore[arg-type]
    for row, layer, head in np.ndindex(2, 2, 2):
        costs = []
        for cut in cuts:
            candidates = slice(4, cut - 6)
            keys = stored["sum"][row].keys[layer, head, candidates]
            useful_first = keys.norm(dim=-1).argsort()
            worth = {name: of[row].utility_at(cut)[layer, head, candidates] for name, of in stored.items()}
            cost = []
            for name in ("max", "sum"):
                ranked, best = worth[name][useful_first].tolist(), sorted(worth[name].tolist(), reverse=True)
                cost.append(sum(r * x for r, x in enumerate(ranked, 1)) / sum(r * x for r, x in enumerate(best, 1)))
            ranked = worth["sum"][useful_first]
            costs.append([*cost, *(float(ranked[b - 10 :].sum() / ranked.sum()) for b in budgets)])
        assert found["knorm"][row, layer, head].tolist() == pytest.approx(np.mean(costs, axis=0).tolist(), rel=1e-4)
    assert found[ORACLE][..., 1].numpy() == pytest.approx(1.0)
    assert (found["knorm"][..., 1] > 1).all()


@pytest.mark.parametrize(
    ("cuts", "budgets", "message"),
    [((35,), (12,), "cut 35 is impossible"), ((36,), (36,), "budget 36 decides"), ((36,), (10,), "budget 10 decides")],
)
def test_cuts_and_budgets_that_decide_nothing_are_refused(
    model: PreTrainedModel, cuts: tuple[int, ...], budgets: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rank_costs({}, random_traces([70]), model=model, cuts=cuts, budgets=budgets, interval=6)


def test_the_overhead_is_that_of_the_papers_shape() -> None:
    # Key and value to 256 each, these, 2 norms and 14 places to 256, to 256, to 1; one agent per layer and KV head.
    matrices = 2 * 128 * 256 + (512 + 2 + 14) * 256 + 256 * 256 + 256
    found = overhead("Qwen2.5-7B")
    assert found.agents == 112
    assert found.scoring == pytest.approx(2e-9 * 112 * matrices)
    assert found.decoding == pytest.approx(14.0, rel=0.02), "the paper's"


def test_a_page_counts_verdicts_and_says_where_figures_are_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = Figure("table 1", "somewhere", "N", {"x": 1.5}, doubt="Really?")
    element = Element(
        "Thing", figure, "here.", "a command", [Line("x", "1.5", "2", f"{NOT}: y"), Line("z", "", "", SAME)]
    )
    made = page.made_by("the command", trained_at=["abc"], size=1)
    whole = Page("Title", "About.", [element], [OnGPU("Big", figure, ["command --big"])])
    (tmp_path / "results").mkdir()
    shutil.copy(page.RESULTS / "claims.json", tmp_path / "results")
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    assert whole.write("x", tmp_path / "out", made, ship=False) == [tmp_path / "out/x.md"]
    whole.write("x", tmp_path / "out", made, ship=True)
    text = (tmp_path / "results/x.md").read_text()
    assert "| Thing | 1 | 1 | 0 |" in text
    assert text.count("somewhere: x 1.5 (table 1) [N]. Really?") == 2
    assert "command --big" in text
    numbers = json.loads((tmp_path / "results/x.json").read_text())
    assert numbers["elements"][0]["lines"][0] == {"what": "x", "paper": "1.5", "ours": "2", "verdict": f"{NOT}: y"}
    assert numbers["size"] == 1


def test_what_the_claims_measured_is_read_from_their_committed_numbers() -> None:
    half, rl, free = foresightkv.half_budget(), foresightkv.reinforcement(), kvp.against_attention_free()
    assert "reproduce claims" in half.command
    assert [line.verdict for line in half.lines].count(SAME) == 1
    assert {line.verdict for line in rl.lines if line.what.startswith("LM loss")} == {SAME}
    assert [line.verdict for line in free.lines].count(SAME) == 15
    assert len(kvp.longer_traces().lines) == 8


def test_the_commands_that_need_a_gpu_can_be_given() -> None:
    given = [line.split() for row in (*foresightkv.on_gpu(), *kvp.on_gpu()) for line in row.commands]
    outs = [options[options.index("--out") + 1] for _, *options in given if "--out" in options]
    assert len(set(outs)) == len(outs)  # an evaluation refuses the directory of another
    for program, command, *options in given:
        if program != "kvenv":
            continue
        if command == "train":
            args = train.parse(options)
            assert (args.env.device, args.run.eval_every) == ("cuda", 0)
        else:
            kind: Any = {"record": record_command, "evaluate": evaluate}[command].Args
            args = tyro.cli(kind, args=options)
            assert (args.device, args.dtype) == ("cuda", "bfloat16")
            assert args.trace_length >= 4096
            assert {name.split("/")[0] for name in getattr(args, "tasks", ())} <= set(TASKS)


def test_help_lists_the_parts_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("claims", "foresightkv", "kvp"):
        with pytest.raises(SystemExit) as stopped:
            reproduce.main([name, "--help"])
        assert stopped.value.code == 0
        assert f"usage: kvenv reproduce {name} " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("foresightkv", "--oracle-traces 2 --num-traces 2 --updates 1 1 --batch 1 1", "## Rewards"),
        ("kvp", "--store-traces 8 --updates 1 --num-traces 2 --cost-traces 1 --cuts 128", "## Heads differ"),
    ],
)
def test_both_commands_from_end_to_end(
    name: str, size: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def in_this_process(jobs: list[Job], processes: int, times: Path) -> None:
        for job in jobs:
            if not job.result.exists():
                job.work(*job.arguments)
                done.append(job.name)

    monkeypatch.setattr(study, "run_jobs", in_this_process)
    monkeypatch.setattr(study, "MEASURED_TOGETHER", 6)
    for _ in range(2):
        reproduce.main([name, "--out", str(tmp_path), *size.split()])
    assert len(done) == len(set(done)) > 10, "a job was done twice"
    text = (tmp_path / f"{name}.md").read_text()
    assert says in text
    assert f"`python -m experiments.reproduce {name} --out {tmp_path} {size}`" in text
    assert not re.search(r"\bnan\b", text)
    found = json.loads((tmp_path / f"{name}.json").read_text())
    verdicts = {line["verdict"].split(":")[0] for element in found["elements"] for line in element["lines"]}
    assert verdicts <= {SAME, NOT, NONE}
    with pytest.raises(ValueError, match="choose another --out"):
        reproduce.main([name, "--out", str(tmp_path)])
