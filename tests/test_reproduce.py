"""Claims follow from rows as the rules of comparison say, and the whole command runs and goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import agents
from agents.imitation import ImitationConfig
from experiments import evaluate, reproduce
from experiments.jobs import Job
from experiments.reproduce import claims, plan, study, verdicts
from experiments.reproduce.plan import Plan, Size, attention_free, heuristics
from experiments.reproduce.study import Contestant
from experiments.reproduce.verdicts import Chosen, Measured
from experiments.results import read_rows
from kvenv.evaluation import Row

BUDGETS = (32, 64)
ROW = Row(
    policy="", traces="recall", split="test", trace=0, seed=0, budget=64, interval=16, schedule="periodic",
    score_from=80, scored_tokens=9, scored_answers=2, lm_loss=2.0, full_lm_loss=2.0, answer_loss=0.0,
    full_answer_loss=0.0, answer_accuracy=1.0, low_entropy_increase=0.1, agreement_with_golden=None, kept_fraction=0.2,
)  # fmt: skip


def rows(policy: str, budget: int, loss: float, seeds: int = 1, traces: int = 30, **changes: float) -> list[Row]:
    """Return rows whose answer loss is spread by 0.1 around ``loss``, alike for all policies, and shifted by seed."""
    noise = np.random.default_rng(0).normal(size=traces) / 10
    return [
        replace(
            ROW, policy=policy, budget=budget, trace=i, seed=seed, answer_loss=loss + noise[i] + 0.01 * seed, **changes
        )
        for i in range(traces)
        for seed in range(seeds)
    ]


def measured(learned_at_half: float = 0.9, golden_at_half: float = 0.1, accuracy: float = 1.0) -> Measured:
    """Return a table in which a learned policy needs half the budget of the heuristics, or not quite."""
    return Measured([
        *rows("keydiff", 64, 1.0), *rows("keydiff", 32, 3.0), *rows("random", 64, 4.0), *rows("random", 32, 5.0),
        *rows("golden", 64, 0.0), *rows("golden", 32, golden_at_half),
        *rows("golden-expected", 64, 0.2, traces=5), *rows("golden-expected", 32, 1.0, traces=5),
        *rows("grpo", 64, 0.3, seeds=3), *rows("grpo", 32, learned_at_half, seeds=3, answer_accuracy=accuracy),
    ])  # fmt: skip


def chosen(table: Measured) -> Chosen:
    """Return choices made on the same rows."""
    return Chosen(table, ["grpo"], ["keydiff", "random"])


@pytest.mark.parametrize(
    ("changes", "held", "says"),
    [
        ({}, True, "yes"),
        ({"learned_at_half": 1.0}, True, "yes"),  # worse by 0.01 in the mean over seeds: within 0.02
        ({"learned_at_half": 1.1}, False, "no"),
        ({"accuracy": 0.98}, False, "no"),
        ({"learned_at_half": 1.1, "golden_at_half": 0.97}, None, "no room"),
    ],
)
def test_half_the_budget(changes: dict[str, float], held: bool | None, says: str) -> None:
    table = measured(**changes)
    claim = verdicts.half_budget(table, chosen(table), BUDGETS)
    assert (claim.held, claim.table[0][-1]) == (held, says)
    assert len(claim.table) == 1
    assert claim.note == f"Budgets with room: recall {0 if says == 'no room' else 1}."


def test_the_gap_closed_is_a_mean_over_cells_on_the_traces_that_the_ceiling_has() -> None:
    table = measured()
    half, whole = ((high - own - 0.01) / (high - low) for high, own, low in ((3.0, 0.9, 1.0), (1.0, 0.3, 0.2)))
    claim = verdicts.gap_closed(table, chosen(table), BUDGETS)
    assert claim.held
    assert half > 1
    assert [line[-2].split()[0] for line in claim.table] == [f"{half:.0%}", f"{whole:.0%}"]
    assert f"counting as 100 %: {(1 + whole) / 2:.0%} [" in claim.note, "more than one gap makes up for nothing"
    assert "golden-expected on the first 5 traces" in claim.note
    worse = measured(learned_at_half=2.5)
    assert not verdicts.gap_closed(worse, chosen(worse), BUDGETS).held


def test_where_there_is_no_gap_no_share_of_it_counts() -> None:
    table = Measured([
        *rows("keydiff", 64, 1.0), *rows("random", 64, 4.0), *rows("golden", 64, 0.0),
        *rows("golden-expected", 64, 1.5, traces=5), *rows("grpo", 64, 0.3),
    ])  # fmt: skip
    claim = verdicts.gap_closed(table, chosen(table), (64,))
    assert claim.held is None
    assert claim.table[0][-2] == "no gap"


def test_shares_of_a_gap_have_intervals_that_know_of_shared_seeds() -> None:
    rng = np.random.default_rng(0)
    high, low = rng.normal(2.0, 0.1, size=(50, 1)), rng.normal(0.0, 0.1, size=(50, 1))
    narrow, _ = verdicts.share_closed(high, low, rng.normal(0.5, 0.1, size=(50, 5)))
    wide, samples = verdicts.share_closed(high, low, 0.5 + 0.2 * rng.normal(size=(1, 5)) + np.zeros((50, 1)))
    assert narrow.low < 0.75 < narrow.high
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)
    assert samples[0] == wide.mean


@pytest.mark.parametrize(
    ("before", "rise", "lm_loss", "held"),
    [(0.1, 0.06, 2.0, True), (0.1, 0.08, 2.0, False), (0.1, 0.06, 2.05, False), (0.0, -0.01, 2.0, None)],
)
def test_rl_must_take_away_a_share_of_the_rise(before: float, rise: float, lm_loss: float, held: bool | None) -> None:
    table = Measured(
        [
            *rows("full", 64, 1.0, low_entropy_increase=0.0, lm_loss=1.0),
            *rows("imitation", 64, 1.0, seeds=2, low_entropy_increase=before, lm_loss=2.0),
            *rows("grpo", 64, 1.0, seeds=2, low_entropy_increase=rise, lm_loss=lm_loss),
        ]
    )
    claim = verdicts.rl_adds(table, (64,))
    assert claim.held is held
    assert (claim.table[0][-1] == "nothing to take") == (held is None)


def test_kvp_must_beat_every_rival_where_there_is_something_to_win() -> None:
    golden, rivals = rows("golden", 64, 0.0), ("keydiff", "random")
    table = Measured([*golden, *rows("kvp", 64, 0.5), *rows("keydiff", 64, 0.6), *rows("random", 64, 2.0)])
    assert verdicts.kvp_alone(table, rivals, (64,)).held
    lost = Measured([*golden, *rows("kvp", 64, 0.7), *rows("keydiff", 64, 0.6), *rows("random", 64, 2.0)])
    claim = verdicts.kvp_alone(lost, rivals, (64,))
    assert (claim.held, claim.table[0][-1]) == (False, "not keydiff")
    easy = Measured([*golden, *rows("kvp", 64, 0.7), *rows("keydiff", 64, 0.04), *rows("random", 64, 2.0)])
    assert verdicts.kvp_alone(easy, rivals, (64,)).table[0][-1] == "saturated"


def test_ppo_must_beat_its_start_and_random() -> None:
    others = [*rows("random", 64, 2.0), *rows("ppo-initial", 64, 1.0, seeds=2)]
    assert verdicts.ppo_learns(Measured([*others, *rows("ppo", 64, 0.9, seeds=2)]), (64,)).held
    claim = verdicts.ppo_learns(Measured([*others, *rows("ppo", 64, 1.5, seeds=2)]), (64,))
    assert [line[-1] for line in claim.table] == ["no", "yes"]


def test_rows_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="no rows to compare"):
        Measured([])
    with pytest.raises(ValueError, match="with score_from 80 and 96 can't be put in one table"):
        Measured([ROW, replace(ROW, score_from=96, trace=1)])
    with pytest.raises(ValueError, match="no rows of policy 'h2o' on traces 'recall' at budget 64"):
        Measured([ROW]).values("recall", "h2o", 64, "answer_loss")


def test_the_plan_measures_everything_that_is_claimed(tmp_path: Path) -> None:
    jobs = Plan(tmp_path, Size()).jobs()
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert {name for job in jobs for name in job.after} <= set(names)
    for learner in plan.LEARNERS:
        assert {f"{learner}-{seed}" for seed in range(5)} <= set(names)
    assert set(attention_free()) == {"random", "random-prompt", "streaming", "knorm", "keydiff", "lagkv"}
    tested = "-".join(name for name in names if name.startswith("test-"))
    for name in (*heuristics(), *plan.LEARNERS, "ppo-initial", "kvp-recall", "golden", "golden-expected", "full"):
        assert f"-{name}-0" in tested


def test_measurements_are_done_once_and_judged_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def evaluated(policies: dict[str, object], *args: object, **options: object) -> list[list[Row]]:
        calls.append(list(policies))
        return [[replace(ROW, policy=label) for label in policies]]

    monkeypatch.setattr(study, "evaluate_policies", evaluated)
    both, args = Plan(tmp_path, Size(seeds=(0, 1))), evaluate.Args(traces=("recall",))
    for contestants in (["grpo", "random"], ["grpo", "random", "h2o"]):
        group = [Contestant(name, "random", int(name == "grpo")) for name in contestants]
        paths = [tmp_path / "rows" / f"test-{one.name}-{one.seed}.json" for one in group]
        study.measure(args, group, paths, tmp_path / "done")
    assert calls == [["grpo-1", "random-0"], ["h2o-0"]]
    assert [(row.policy, row.seed) for row in both.rows("test")] == [("grpo", 1), ("h2o", 0), ("random", 0)]
    assert {row.policy for row in Plan(tmp_path, Size(seeds=(0,))).rows("test")} == {"h2o", "random"}


def test_a_measurement_that_was_killed_loses_no_finished_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], list[int]]] = []
    alive = [True]

    def evaluated(policies: dict[str, object], _: object, ids: list[int], **options: object) -> Iterator[list[Row]]:
        asked.append((list(policies), list(ids)))
        for trace in ids:
            for budget in BUDGETS:
                for label in policies:
                    if trace == 2 and label == "h2o-0" and alive[0]:
                        raise KeyboardInterrupt
                    yield [replace(ROW, policy=label, trace=trace, budget=budget, answer_loss=trace + budget / 100)]

    monkeypatch.setattr(study, "evaluate_policies", evaluated)
    args = evaluate.Args(traces=("recall",), num_traces=4, budgets=BUDGETS)
    group = [Contestant("random", "random"), Contestant("h2o", "h2o")]
    paths = [tmp_path / "rows" / f"test-{one.name}-0.json" for one in group]
    for alive[0] in (True, False):
        with pytest.raises(KeyboardInterrupt) if alive[0] else nullcontext():
            study.measure(args, group, paths, tmp_path / "done")
        assert (tmp_path / "done").exists() != alive[0]
        # A line that was torn, when the machine went down with it.
        if alive[0]:
            with paths[1].with_suffix(".jsonl").open("a") as file:
                file.write('[{"policy": "h2')
    assert asked == [(["random-0", "h2o-0"], [0, 1, 2, 3]), (["random-0", "h2o-0"], [2, 3])]
    for path, name in zip(paths, ("random", "h2o"), strict=True):
        cells = [(row.policy, row.trace, row.budget, row.answer_loss) for row in read_rows(path)]
        assert sorted(cells) == [(name, i, budget, i + budget / 100) for i in range(4) for budget in BUDGETS]
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == ["test-h2o-0.json", "test-random-0.json"]


def test_a_directory_goes_on_with_more_seeds_but_no_other_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Plan(tmp_path, Size(seeds=(0,), num_traces=64)).begin()
    Plan(tmp_path, Size(seeds=(0, 1), num_traces=64)).begin()
    with pytest.raises(ValueError, match=r"num_traces 200 is not what .* was begun with, 64: choose another --out"):
        Plan(tmp_path, Size()).begin()
    monkeypatch.setattr(plan, "ImitationConfig", partial(ImitationConfig, power=1.0))
    with pytest.raises(ValueError, match=r"power 1\.0 is not what .* was begun with, 3\.0"):
        Plan(tmp_path, Size(seeds=(0,), num_traces=64)).begin()
    (tmp_path / "size.json").unlink()
    (tmp_path / "done").mkdir()
    with pytest.raises(ValueError, match="results of unknown size"):
        Plan(tmp_path, Size(seeds=(0,), num_traces=64)).begin()


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (claims, plan):
        monkeypatch.setattr(module, "heuristics", lambda: ["random", "keydiff"])
        monkeypatch.setattr(module, "attention_free", lambda: ["random", "keydiff"])
    monkeypatch.setattr(plan, "FAMILIES", ("recall", "tracking"))
    done: list[str] = []

    def in_this_process(jobs: list[Job], processes: int, times: Path) -> None:
        for job in jobs:
            if not job.result.exists():
                job.work(*job.arguments)
                done.append(job.name)

    monkeypatch.setattr(study, "run_jobs", in_this_process)
    shipped = tmp_path / "package"
    monkeypatch.setattr(agents, "__file__", str(shipped / "__init__.py"))
    size = [
        "--seeds",
        "0",
        "--budgets",
        "32",
        "64",
        "--trained-budgets",
        "32",
        "64",
        "--num-traces",
        "2",
        "--validation-traces",
        "2",
    ]
    size += ["--expected-traces", "1", "--long-traces", "1", "--store-traces", "8", "--updates", "1", "1", "1", "1"]
    for _ in range(2):
        reproduce.main(["claims", "--out", str(tmp_path / "out"), "--ship", *size])
    assert len(done) == len(set(done)) > 20, "a job was done twice"
    found = json.loads((tmp_path / "out/claims.json").read_text())
    assert [claim["name"] for claim in found["claims"]][:3] == ["Half the budget", "RL adds to SL", "Gap closed"]
    assert "## Gap closed" in (tmp_path / "out/claims.md").read_text()
    assert (tmp_path / "out/learning.png").stat().st_size > 10_000
    for name in agents.TRAINED:
        assert agents.make(shipped / "trained" / name).name == name
