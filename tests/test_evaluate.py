"""Evaluation rows against plain losses, what a batch may not change, bad input, and the command from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import agents
import kvenv.lookahead
from experiments import evaluate as command
from experiments.results import read_rows
from kvenv.evaluation import FULL, Row, evaluate, kept_fraction
from kvenv.state import Protection
from kvenv.traces import Trace, load_traces
from kvenv.traces.user import ListSource
from tests.policies import kvenv_model, random_traces
from tests.reference import plain_losses

ANSWERS = ((2, 4), (40, 42), (43, 44))


def source(lengths: tuple[int, ...] = (60, 49, 55), answers: tuple = ANSWERS, prompt: int = 0) -> ListSource:
    traces = [dataclasses.replace(t, answers=answers, prompt_length=prompt) for t in random_traces(lengths)]
    return ListSource("random tokens", "test", traces)


def run(policies: list[str], traces: ListSource, **options) -> list[Row]:
    settings = {"model": kvenv_model(), "budgets": (12,), "interval": 5, "protection": Protection(2, 3)} | options
    made = {name: None if name == FULL else agents.make(name) for name in policies}
    return [row for batch in evaluate(made, traces, range(traces.size), **settings) for row in batch]


def plain(trace: Trace) -> np.ndarray:
    return plain_losses(kvenv_model(), trace.tokens).numpy()


def test_the_full_cache_has_the_plain_models_losses() -> None:
    traces = source()
    rows = run([FULL], traces, budgets=(12, 14))
    assert len(rows) == 6
    for row in rows:
        trace = traces[row.trace]
        nll = plain(trace)
        assert (row.score_from, row.scored_tokens, row.scored_answers) == (19, len(trace.tokens) - 20, 2)
        assert row.lm_loss == row.full_lm_loss == pytest.approx(nll[19:].mean(), abs=1e-9)
        assert row.answer_loss == row.full_answer_loss == pytest.approx(nll[[39, 40, 42]].mean(), abs=1e-9)
        assert (row.low_entropy_increase, row.kept_fraction, row.agreement_with_golden) == (0, 1, None)


@pytest.mark.parametrize("schedule", ["periodic", "prefill"])
def test_a_full_budget_makes_every_policy_the_full_cache(schedule: str) -> None:
    names = [name for name in agents.names(trained=False) if name != "golden-expected"]
    rows = run(names, source(prompt=20), budgets=(60,), schedule=schedule, score_from=20)
    assert len(rows) == 3 * len(names)
    for row in rows:
        assert row.lm_loss == pytest.approx(row.full_lm_loss, abs=1e-9)
        assert row.answer_loss == pytest.approx(row.full_answer_loss, abs=1e-9)
        assert row.low_entropy_increase == pytest.approx(0, abs=1e-9)
        assert (row.kept_fraction, row.agreement_with_golden) == (1, 1)


def test_rows_are_complete_and_only_noise_differs_by_seed() -> None:
    rows = run([FULL, "golden", "random", "h2o"], source(), budgets=(12, 16), seeds=(0, 7))
    cells = {(row.policy, row.budget, row.trace, row.seed): row for row in rows}
    assert len(cells) == len(rows) == 4 * 2 * 3 * 2
    assert {row.score_from for row in rows} == {21}
    for (policy, budget, trace, seed), row in cells.items():
        assert row.lm_loss != row.full_lm_loss or policy == FULL
        assert (row.agreement_with_golden == 1) == (policy == "golden")
        if seed == 7:
            first = cells[policy, budget, trace, 0]
            assert (dataclasses.replace(row, seed=0) == first) == (policy != "random")


def test_rows_depend_neither_on_the_batch_nor_on_other_budgets() -> None:
    together = run(["random", "golden"], source(), budgets=(12, 15, 17), score_from=24)
    alone = [
        row
        for budget in (12, 15, 17)
        for row in run(["random", "golden"], source(), budgets=(budget,), score_from=24, batch_size=1)
    ]
    key = lambda row: (row.budget, row.policy, row.trace)  # noqa: E731
    for one, other in zip(sorted(together, key=key), sorted(alone, key=key), strict=True):
        for field in dataclasses.fields(Row):
            values = getattr(one, field.name), getattr(other, field.name)
            assert values[0] == (pytest.approx(values[1], abs=1e-9) if isinstance(values[1], float) else values[1])


@pytest.mark.parametrize("schedule", ["periodic", "prefill"])
@pytest.mark.parametrize(("first", "budget"), [(17, 12), (20, 15), (9, 40)])
def test_kept_fraction_is_counted_pair_by_pair(schedule: str, first: int, budget: int) -> None:
    if schedule == "periodic":
        first = budget + 5
    held, shares = 0, []
    for position in range(49):
        since = position - first
        if since == 0 or (since > 0 and since % 5 == 0 and schedule == "periodic"):
            held = min(held, budget)
        held += 1
        shares.append(held / (position + 1))
    expected = np.mean(shares[11:])
    assert kept_fraction(50, first, budget, 5, schedule, 11) == pytest.approx(expected, abs=1e-12)


def test_traces_without_scored_answers_have_none() -> None:
    for answers in ((), ((2, 4), (17, 18))):
        for row in run([FULL, "random"], source(answers=answers)):
            assert row.scored_answers == 0
            assert row.answer_loss is row.full_answer_loss is row.answer_accuracy is None
            assert math.isfinite(row.lm_loss)


def test_prefill_evicts_once_and_scores_what_follows_the_prompt() -> None:
    rows = run(["golden", "streaming"], source(prompt=30), schedule="prefill")
    assert {row.score_from for row in rows} == {30}
    for row in rows:
        kept = [(12 + i) / (30 + i) for i in range(1, row.scored_tokens + 1)]
        assert row.kept_fraction == pytest.approx(np.mean(kept))
        assert row.lm_loss != row.full_lm_loss


def test_golden_expected_shares_its_continuations_between_budgets(monkeypatch: pytest.MonkeyPatch, tiny_model) -> None:
    monkeypatch.setattr(kvenv.lookahead, "CONTINUATIONS", 2)
    traces = load_traces("recall", split="validation", tokenizer=tiny_model.tokenizer, trace_length=96)
    asked: list[tuple[int, int]] = []
    original = traces.continuations
    monkeypatch.setattr(traces, "continuations", lambda t, cut, n: asked.append((t, cut)) or original(t, cut, n))
    options = {"model": tiny_model.model, "score_from": 64}
    policies = {"golden-expected": agents.make("golden-expected")}
    together = [row for rows in evaluate(policies, traces, [3, 4], budgets=(32, 48), **options) for row in rows]
    assert asked == [(trace, cut) for trace in (3, 4) for cut in (48, 64, 80)]
    (alone,) = evaluate(policies, traces, [3, 4], budgets=(48,), **options)
    assert [r.lm_loss for r in together if r.budget == 48] == pytest.approx([r.lm_loss for r in alone], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": (4,)}, "budget 4 is less than the 5 protected pairs of trace 'random/0'"),
        ({"budgets": ()}, "budgets .* at least one"),
        ({"budgets": (12, 12)}, "nothing twice"),
        ({"seeds": ()}, "seeds .* at least one"),
        ({"interval": 0}, "interval 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"schedule": "sometimes"}, "unknown schedule 'sometimes': known are periodic, prefill"),
        ({"budgets": (12, 60)}, "trace 'random/0' has 60 tokens, but only targets above position 65"),
        ({"schedule": "prefill"}, "no prompt"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(["random"], source(), **options)


def test_golden_expected_needs_a_family() -> None:
    with pytest.raises(ValueError, match="only the trace families can"):
        run(["golden-expected"], source())


SMALL = [
    "--traces",
    "recall",
    "--trace-length",
    "128",
    "--num-traces",
    "2",
    "--budgets",
    "24",
    "40",
    "--seeds",
    "0",
    "1",
]


def test_the_command_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = ["full", "golden", "random", "h2o"]
    command.main([*SMALL, "--policies", *policies, "--batch-size", "1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())
    assert len(rows) == 4 * 2 * 2 * 2
    assert set(rows[0]) == {field.name for field in dataclasses.fields(Row)}
    assert {row["score_from"] for row in rows} == {56}
    assert read_rows(tmp_path / "results.json")[3] == Row(**rows[3])
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG"
    out = capsys.readouterr().out
    assert all(policy in out for policy in policies)
    assert "budget 24" in out

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / "recall" / "h2o")).Reload()
    assert set(events.Tags()["scalars"]) >= {"eval/low_entropy_increase", "eval/agreement_with_golden"}
    points = {point.step: point.value for point in events.Scalars("eval/low_entropy_increase")}
    for budget in (24, 40):
        values = [row["low_entropy_increase"] for row in rows if row["policy"] == "h2o" and row["budget"] == budget]
        assert points[budget] == pytest.approx(np.mean(values), rel=1e-5)


def test_random_is_always_in(tmp_path: Path) -> None:
    command.main([*SMALL, "--policies", "h2o", "--budgets", "24", "--out", str(tmp_path)])
    assert {row.policy for row in read_rows(tmp_path / "results.json")} == {"h2o", "random"}


def test_a_killed_run_leaves_the_finished_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args, **options) -> Iterator[list[Row]]:
        # Two cells, one for each budget, are the first batch; the third is the second batch's.
        yield from list(evaluate(*args, **options))[:3]
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        command.main([*SMALL, "--policies", "random", "--batch-size", "1", "--out", str(tmp_path)])
    assert [row.trace for row in read_rows(tmp_path / "results.json")] == [0] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "h3o"], "unknown policy 'h3o': known are full, random, .*h2o.*or a directory"),
        (["--traces", "rcall"], "unknown traces 'rcall'"),
        (["--split", "dev"], "unknown split 'dev'"),
        (["--budgets", "8"], "budget 8 is less than the 20 protected"),
        (["--score-from", "40"], "score_from 40 .* choose 56 or more"),
        (["--num-traces", "0"], "num_traces 0 must be at least 1"),
        (["--sinks", "-1"], "sinks must be an integer of at least 0, not -1"),
        (["--recent", "-3"], "recent must be an integer of at least 0, not -3"),
        (["--policies"], r"policies \[\] must hold at least one"),
        (["--policies", "h2o", "h2o"], "policies .* nothing twice"),
        (["--traces", "recall", "recall"], "traces .* nothing twice"),
        (["--first-trace", "-1"], "first_trace -1"),
        (["--trace-length", "100000"], "trace_length 100000 exceeds"),
    ],
)
def test_bad_arguments_are_one_clear_error(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        command.main([*SMALL, "--policies", "random", "--out", str(tmp_path), *options])
    assert not list(tmp_path.iterdir())


def test_a_file_with_too_few_traces_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    with pytest.raises(ValueError, match=r"are 1: .*--num-traces 2"):
        command.main([*SMALL, "--traces", str(tmp_path / "t.jsonl"), "--policies", "random", "--out", str(tmp_path)])


def test_a_foreign_json_is_no_results(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('[{"policy": "h2o"}]')
    with pytest.raises(ValueError, match=r"is not a results\.json"):
        read_rows(tmp_path / "results.json")


def test_losses_by_entropy_are_those_of_tokens_sorted_by_it() -> None:
    traces = source(lengths=(80, 71), answers=())
    for row in run(["full", "random"], traces, by_entropy=True):
        trace = traces[row.trace]
        with torch.no_grad():
            logits = kvenv_model()(torch.as_tensor(trace.tokens)[None]).logits[0, :-1]
        entropy = torch.distributions.Categorical(logits=logits).entropy().numpy()[row.score_from :]
        nll = plain(trace)[row.score_from :]
        order, parts = np.argsort(entropy, kind="stable"), []
        assert row.full_loss_by_entropy is not None
        for part in np.array_split(order, 10):
            parts.append(nll[part].mean())
        np.testing.assert_allclose(row.full_loss_by_entropy, parts, atol=1e-6)
        assert (row.loss_by_entropy == row.full_loss_by_entropy) == (row.policy == "full")
        sizes = [len(part) for part in np.array_split(order, 10)]
        assert row.loss_by_entropy is not None
        assert np.average(row.loss_by_entropy, weights=sizes) == pytest.approx(row.lm_loss)
    assert {row.loss_by_entropy for row in run(["full"], traces)} == {None}


def test_targets_too_few_to_be_split_by_entropy_are_refused() -> None:
    assert run(["random"], source(lengths=(28,), answers=()), by_entropy=True)[0].scored_tokens == 10
    with pytest.raises(
        ValueError, match=r"trace '.*' has 9 targets above position 17, too few for 10 parts by entropy"
    ):
        run(["random"], source(lengths=(27,), answers=()), by_entropy=True)
