"""The paired bootstrap on data whose truth is known, verdicts, and rows that must not be compared."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from experiments.comparison import Comparison, Estimate, beats, bootstrap, no_worse, scored, yardstick
from experiments.tables import make_table, rise
from kvenv.evaluation import Row

TEMPLATE = Row(
    policy="random",
    traces="recall",
    split="test",
    trace=0,
    seed=0,
    budget=32,
    interval=16,
    schedule="periodic",
    score_from=48,
    scored_tokens=100,
    scored_answers=3,
    lm_loss=2.0,
    full_lm_loss=1.5,
    answer_loss=1.0,
    full_answer_loss=0.1,
    answer_accuracy=0.5,
    low_entropy_increase=0.1,
    agreement_with_golden=0.3,
    kept_fraction=0.2,
)


def rows(losses: dict[str, np.ndarray], **fields) -> list[Row]:
    """Return rows with these answer losses (traces, seeds) of each policy."""
    return [
        dataclasses.replace(
            TEMPLATE, policy=policy, trace=trace, seed=seed, answer_loss=float(array[trace, seed]), **fields
        )
        for policy, array in losses.items()
        for trace, seed in np.ndindex(array.shape)
    ]


def test_intervals_cover_the_true_mean() -> None:
    rng = np.random.default_rng(0)
    estimates = [bootstrap(rng.normal(3.0, 2.0, size=(60, 1)), resamples=500) for _ in range(200)]
    assert 0.89 <= np.mean([e.low <= 3.0 <= e.high for e in estimates]) <= 0.99
    assert 0.89 <= np.mean([e.bound >= 3.0 for e in estimates]) <= 0.99
    width = np.mean([e.high - e.low for e in estimates])
    assert width == pytest.approx(2 * 1.96 * 2.0 / np.sqrt(60), rel=0.1)


def test_traces_are_the_unit_not_seeds() -> None:
    rng = np.random.default_rng(1)
    traces = rng.normal(size=(50, 1))
    one = bootstrap(traces)
    # Four seeds that say nearly the same of each trace are no more evidence than one.
    four = bootstrap(traces + 1e-3 * rng.normal(size=(50, 4)))
    assert four.high - four.low == pytest.approx(one.high - one.low, rel=0.15)
    # Seeds that vary by themselves widen the interval beyond that of the traces' means.
    noisy = traces + 5 * rng.normal(size=(50, 4))
    over_means = bootstrap(noisy.mean(axis=1, keepdims=True))
    nested = bootstrap(noisy)
    assert nested.high - nested.low > over_means.high - over_means.low


@pytest.mark.parametrize("shared", [True, False])
def test_seeds_that_all_traces_share_are_resampled_for_all_of_them(shared: bool) -> None:
    # Five trainings that differ by 0.2, measured on 100 traces: the traces don't average that away.
    rng = np.random.default_rng(5)
    estimates = [
        bootstrap(0.2 * rng.normal(size=(1, 5)) + 0.05 * rng.normal(size=(100, 5)), shared_seeds=shared, resamples=300)
        for _ in range(200)
    ]
    covered = np.mean([e.low <= 0 <= e.high for e in estimates])
    # The percentile bootstrap of five is too narrow by itself: it covers 83 % in theory.
    assert covered > 0.75 if shared else covered < 0.4


def test_pairing_removes_what_policies_share() -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(5, 3, size=(40, 2))
    comparison = Comparison(rows({"a": shared, "b": shared + 0.2 + 0.05 * rng.normal(size=(40, 2))}))
    difference = comparison.difference("recall", "a", "b", 32)
    single = bootstrap(comparison.values("recall", "a", 32, "answer_loss"))
    assert difference.high - difference.low < 0.1 * (single.high - single.low)
    assert beats(difference)
    assert not beats(comparison.difference("recall", "b", "a", 32))


def test_identical_policies_differ_by_exactly_nothing() -> None:
    values = np.random.default_rng(3).normal(size=(30, 3))
    difference = Comparison(rows({"a": values, "b": values.copy()})).difference("recall", "a", "b", 32)
    assert difference == Estimate(0, 0, 0, 0)
    assert not beats(difference)


def test_equal_values_give_equal_intervals() -> None:
    values = np.random.default_rng(4).normal(size=(30, 3))
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, seed=1) != bootstrap(values)


@pytest.mark.parametrize(("loss", "accuracy", "verdict"), [(0.01, 0.0, True), (0.03, 0.0, False), (0.01, 0.02, False)])
def test_no_worse_needs_both_bounds(loss: float, accuracy: float, verdict: bool) -> None:
    assert no_worse(Estimate(0, -1, 1, loss), Estimate(0, -1, 1, accuracy)) is verdict


@pytest.mark.parametrize("field", ["score_from", "interval", "schedule", "split"])
def test_rows_on_other_terms_are_never_in_one_table(field: str) -> None:
    other = {"score_from": 80, "interval": 8, "schedule": "prefill", "split": "train"}[field]
    mixed = rows({"a": np.ones((2, 1))}) + rows({"b": np.ones((2, 1))}, **{field: other})
    with pytest.raises(ValueError, match=f"{field} .* and {other} can't be put in one table"):
        Comparison(mixed)


def test_families_may_be_scored_from_elsewhere() -> None:
    Comparison(rows({"a": np.ones((2, 1))}) + rows({"a": np.ones((2, 1))}, traces="book", score_from=80))


def test_holes_and_doubles_are_refused() -> None:
    complete = rows({"a": np.ones((3, 2)), "b": np.ones((3, 2))})
    with pytest.raises(ValueError, match="twice"):
        Comparison([*complete, complete[0]])
    with pytest.raises(ValueError, match="missing some seeds"):
        Comparison(complete[1:]).values("recall", "a", 32, "answer_loss")
    with pytest.raises(ValueError, match="not run on the same traces and seeds"):
        Comparison(complete[2:]).difference("recall", "a", "b", 32)
    with pytest.raises(ValueError, match="no rows of policy 'c'"):
        Comparison(complete).values("recall", "c", 32, "answer_loss")
    with pytest.raises(ValueError, match="no rows to compare"):
        Comparison([])


def test_traces_without_answers_are_left_out_and_counted() -> None:
    unanswered = {"scored_answers": 0, "answer_loss": None, "full_answer_loss": None, "answer_accuracy": None}
    every = rows({"a": np.array([[1.0], [2.0], [9.0]]), "golden": np.array([[1.0], [1.0], [9.0]])})
    every = [dataclasses.replace(row, **unanswered) if row.trace == 2 else row for row in every]
    comparison = Comparison(every)
    assert scored(comparison.values("recall", "a", 32, "answer_loss")).tolist() == [[1.0], [2.0]]
    assert comparison.values("recall", "a", 32, "lm_loss").shape == (3, 1)
    assert comparison.without_answers("recall") == (1, 3)
    assert comparison.difference("recall", "a", "golden", 32).mean == 0.5


def test_without_any_answer_there_are_other_metrics() -> None:
    unanswered = {"scored_answers": 0, "full_answer_loss": None, "answer_accuracy": None}
    every = [dataclasses.replace(row, answer_loss=None) for row in rows({"golden": np.ones((3, 1))}, **unanswered)]
    (cell,) = Comparison(every).cells()
    assert "answer_loss" not in cell.estimates
    assert cell.estimates["lm_loss"].mean == 2.0
    assert not cell.saturated


def test_saturation_is_closeness_to_golden() -> None:
    golden = np.full((4, 1), 0.3)
    comparison = Comparison(rows({"golden": golden, "near": golden + 0.04, "far": golden + 0.06}))
    assert {cell.policy: cell.saturated for cell in comparison.cells()} == {"golden": True, "near": True, "far": False}
    assert not any(cell.saturated for cell in Comparison(rows({"near": golden})).cells())


def scored_rows(scores: dict[str, list[float]], task: str = "ruler/vt") -> list[Row]:
    """Return rows of a task with these scores of each policy, by example; the loss says the opposite."""
    unmeasured = {"lm_loss": None, "full_lm_loss": None, "answer_accuracy": None, "low_entropy_increase": None}
    return [
        dataclasses.replace(
            TEMPLATE, policy=policy, traces=task, trace=trace, score=score, answer_loss=score, **unmeasured
        )
        for policy, values in scores.items()
        for trace, score in enumerate(values)
    ]


def test_a_higher_score_is_better_and_a_lower_loss() -> None:
    high, low = [1.0, 1.0, 0.0, 1.0] * 5, [0.0, 1.0, 0.0, 0.0] * 5
    comparison = Comparison(scored_rows({"good": high, "bad": low}))
    assert comparison.yardstick("ruler/vt") == "score"
    assert comparison.better("ruler/vt", "good", "bad", 32)
    assert not comparison.better("ruler/vt", "bad", "good", 32)
    losses = Comparison(rows({"good": np.array([low]).T, "bad": np.array([high]).T}))
    assert losses.yardstick("recall") == "answer_loss"
    assert losses.better("recall", "good", "bad", 32)
    assert not losses.better("recall", "bad", "good", 32)


def test_perplexity_is_judged_by_its_loss() -> None:
    assert yardstick("perplexity/dialogue", {"lm_loss", "answer_loss"}) == "lm_loss"
    assert yardstick("dialogue", {"lm_loss", "answer_loss"}) == "answer_loss"


def test_losses_by_entropy_are_means_over_traces_and_rises_are_shares() -> None:
    lost, full = np.array([[1.0] * 8 + [2.0] * 2, [3.0] * 8 + [4.0] * 2]), np.array([[1.0] * 10, [1.0] * 8 + [3.0] * 2])
    made = [
        dataclasses.replace(TEMPLATE, trace=trace, loss_by_entropy=list(one), full_loss_by_entropy=list(other))
        for trace, (one, other) in enumerate(zip(lost, full, strict=True))
    ]
    (cell,) = Comparison(made).cells()
    assert cell.by_entropy is not None
    np.testing.assert_allclose(cell.by_entropy[0], lost.mean(axis=0))
    assert rise(cell, low=True) == pytest.approx(2.0 / 1.0 - 1)
    assert rise(cell, low=False) == pytest.approx(3.0 / 2.0 - 1)
    (plain,) = Comparison([TEMPLATE]).cells()
    assert plain.by_entropy is rise(plain, low=True) is None


def test_a_table_has_the_columns_that_rows_fill() -> None:
    def headings(made: list[Row]) -> list[str]:
        comparison = Comparison(made)
        cells = comparison.cells()
        return [
            str(column.header).replace("\n", " ") for column in make_table(comparison, cells, cells[0].family).columns
        ]

    assert headings([TEMPLATE]) == ["policy", "answer loss", "acc.", "LM loss", "low-H rise", "as golden", "kept"]
    answered = [
        dataclasses.replace(row, answer_loss=None, agreement_with_golden=None, generated_tokens=7, truncated=False)
        for row in scored_rows({"random": [0.0, 1.0]})
    ]
    assert headings(answered) == ["policy", "score", "kept", "tokens", "cut"]
    perplexity = [dataclasses.replace(TEMPLATE, traces="perplexity/text", answer_loss=None, answer_accuracy=None)]
    assert headings(perplexity) == ["policy", "LM loss", "ppl.", "low-H rise", "as golden", "kept"]
