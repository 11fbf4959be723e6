"""Paired statistics over evaluation rows: means with intervals, differences, and what "beats" means.

The unit is trace x seed. The bootstrap is hierarchical and paired: a difference is taken trace by trace and seed by
seed before anything is resampled. Seeds of a policy's noise are independent from trace to trace and resampled within
each; seeds of trainings are shared by all traces and resampled once for all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from kvenv.evaluation import Row

RESAMPLES = 2000
AT_ONCE = 100
"""Bootstrap samples held at a time."""
NO_WORSE_LOSS = 0.02
"""Nats of answer loss that "no worse" allows."""
NO_WORSE_ACCURACY = 0.01
"""Share of answers that "no worse" allows."""
SATURATED = 0.05
"""Nats of answer loss to golden below which there is nothing left to win."""

METRICS = (
    "answer_loss",
    "answer_accuracy",
    "lm_loss",
    "low_entropy_increase",
    "agreement_with_golden",
    "kept_fraction",
    "score",
    "generated_tokens",
    "truncated",
)
"""The fields of a row that are compared."""

YARDSTICKS = {"score": 1, "answer_loss": -1, "lm_loss": -1}
"""What says which policy is better, the first that is measured, and whether more of it is."""


def yardstick(family: str, measured: Collection[str]) -> str:
    """Return which of the measured metrics says which policy is better; of perplexity the LM loss, whatever else is."""
    if family.startswith("perplexity"):
        return "lm_loss"
    return next(metric for metric in YARDSTICKS if metric in measured)


@dataclass(frozen=True)
class Estimate:
    """A mean with what the bootstrap says about it.

    Attributes
    ----------
    mean : float
        Mean over traces and seeds.
    low, high : float
        Two-sided 95 % interval.
    bound : float
        One-sided 95 % upper bound.
    """

    mean: float
    low: float
    high: float
    bound: float


def bootstrap(values: np.ndarray, *, shared_seeds: bool = False, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Estimate a mean by the hierarchical percentile bootstrap.

    Parameters
    ----------
    values : array (traces, seeds)
        One value per unit.
    shared_seeds : bool
        Whether a seed is the same for all traces (a training's), not drawn anew for each (a policy's noise).
    resamples : int
        Bootstrap samples.
    seed : int
        Of the bootstrap; equal values give equal intervals.

    Raises
    ------
    ValueError
        If there is no unit.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values have shape {values.shape}: the bootstrap needs (traces, seeds), at least one each")
    mean = float(values.mean())
    if (values == values[:, :1]).all():  # a policy without noise: resampling its seeds changes nothing
        values = values[:, :1]
    rng = np.random.default_rng(seed)
    if shared_seeds:
        traces, seeds = (weights(rng, resamples, count) for count in values.shape)
        means = ((traces @ values) * seeds).sum(axis=1)
    else:
        sizes = [min(AT_ONCE, resamples - start) for start in range(0, resamples, AT_ONCE)]
        means = np.concatenate([_resampled_means(values, rng, size) for size in sizes])
    return estimate(mean, means)


def estimate(mean: float, resampled: np.ndarray) -> Estimate:
    """Return a mean with the intervals that its bootstrap samples give."""
    low, high, bound = np.quantile(resampled, (0.025, 0.975, 0.95))
    return Estimate(mean, float(low), float(high), float(bound))


def weights(rng: np.random.Generator, resamples: int, count: int) -> np.ndarray:
    """Return the share (resamples, count) of each of ``count`` things in samples drawn with replacement."""
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples) / count


def _resampled_means(values: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return ``count`` means of values (traces, seeds), traces and then seeds drawn with replacement."""
    traces, seeds = values.shape
    chosen = rng.integers(traces, size=(count, traces, 1))
    within = rng.integers(seeds, size=(count, traces, seeds)) if seeds > 1 else 0
    return values[chosen, within].mean(axis=(1, 2))


def beats(difference: Estimate) -> bool:
    """Return whether a loss difference (one minus the other) says that the first is better: its interval excludes 0."""
    return difference.high < 0


def no_worse(loss: Estimate, accuracy_lost: Estimate) -> bool:
    """Return whether the first is no worse, by the one-sided bounds.

    Parameters
    ----------
    loss : Estimate
        Answer loss of the first minus the second's.
    accuracy_lost : Estimate
        Accuracy of the second minus the first's.
    """
    return loss.bound < NO_WORSE_LOSS and accuracy_lost.bound < NO_WORSE_ACCURACY


def check_comparable(rows: Sequence[Row]) -> None:
    """Refuse to put rows together that were not measured on the same terms.

    Raises
    ------
    ValueError
        If there are no rows, or rows of one family differ in what they score or how they were decoded.
    """
    if not rows:
        raise ValueError("there are no rows to compare")
    for family in dict.fromkeys(row.traces for row in rows):
        for field in ("score_from", "interval", "schedule", "split"):
            found = list(dict.fromkeys(getattr(row, field) for row in rows if row.traces == family))
            if len(found) > 1:
                raise ValueError(
                    f"rows of traces {family!r} with {field} {' and '.join(map(str, found))} can't be put in one "
                    "table: evaluate them together"
                )


@dataclass(frozen=True)
class Cell:
    """One policy at one budget on one family.

    Attributes
    ----------
    family, policy, budget : str, str, int
        Which.
    estimates : dict of str to Estimate
        By metric; those that no row has are missing.
    to_golden : Estimate or None
        Paired difference of answer loss: the policy's minus golden's, if golden was run.
    by_entropy : tuple of two arrays, or None
        Mean loss by tenth of the full-cache entropy, and the full cache's, if rows have them.
    """

    family: str
    policy: str
    budget: int
    estimates: dict[str, Estimate]
    to_golden: Estimate | None
    by_entropy: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def saturated(self) -> bool:
        """Whether golden is within 0.05 nat: nothing is left to win."""
        return self.to_golden is not None and self.to_golden.mean <= SATURATED


def scored(values: np.ndarray) -> np.ndarray:
    """Return the values (traces, seeds) of traces in which something is scored, for every policy the same ones."""
    return values[~np.isnan(values).any(axis=1)]


class Comparison:
    """Rows measured on the same terms, by cell.

    Parameters
    ----------
    rows : sequence of Row
        All policies on the same traces and seeds.

    Raises
    ------
    ValueError
        If rows aren't comparable (:func:`check_comparable`) or one is there twice.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        check_comparable(rows)
        self.families = list(dict.fromkeys(row.traces for row in rows))
        self.policies = list(dict.fromkeys(row.policy for row in rows))
        self.budgets = sorted({row.budget for row in rows})
        self.score_from = {row.traces: row.score_from for row in rows}
        self._cells: dict[tuple[str, str, int], dict[tuple[int, int], Row]] = {}
        for row in rows:
            cell = self._cells.setdefault((row.traces, row.policy, row.budget), {})
            if (row.trace, row.seed) in cell:
                raise ValueError(f"policy {row.policy!r} has trace {row.trace}, seed {row.seed} twice: keep one")
            cell[row.trace, row.seed] = row

    def has(self, family: str, policy: str, budget: int) -> bool:
        """Return whether a cell was measured."""
        return (family, policy, budget) in self._cells

    def values(self, family: str, policy: str, budget: int, metric: str) -> np.ndarray:
        """Return a cell's values (traces, seeds), traces and seeds in ascending order; NaN where nothing is scored.

        Raises
        ------
        ValueError
            If the cell doesn't exist or is incomplete.
        """
        cell = self._cells.get((family, policy, budget))
        if cell is None:
            raise ValueError(f"there are no rows of policy {policy!r} on traces {family!r} at budget {budget}")
        traces, seeds = (sorted(set(ids)) for ids in zip(*cell, strict=True))
        if len(cell) != len(traces) * len(seeds):
            raise ValueError(
                f"rows of policy {policy!r} on traces {family!r} at budget {budget} are missing some seeds"
            )
        return np.array([[getattr(cell[t, s], metric) for s in seeds] for t in traces], dtype=np.float64)

    def difference(self, family: str, one: str, other: str, budget: int, metric: str = "answer_loss") -> Estimate:
        """Return the paired difference of two policies in a cell: one minus other.

        Raises
        ------
        ValueError
            If they don't have the same traces and seeds.
        """
        cells = [self._cells.get((family, policy, budget), {}) for policy in (one, other)]
        if cells[0].keys() != cells[1].keys():
            raise ValueError(
                f"policies {one!r} and {other!r} were not run on the same traces and seeds of {family!r} "
                f"at budget {budget}"
            )
        values = self.values(family, one, budget, metric) - self.values(family, other, budget, metric)
        return bootstrap(scored(values))

    def cells(self) -> list[Cell]:
        """Return all cells by family, budget and policy."""
        return [
            self._cell(family, policy, budget)
            for family in self.families
            for budget in self.budgets
            for policy in self.policies
            if self.has(family, policy, budget)
        ]

    def _cell(self, family: str, policy: str, budget: int) -> Cell:
        values = {metric: scored(self.values(family, policy, budget, metric)) for metric in METRICS}
        estimates = {metric: bootstrap(array) for metric, array in values.items() if array.size}
        golden = "answer_loss" in estimates and self.has(family, "golden", budget)
        return Cell(
            family,
            policy,
            budget,
            estimates,
            self.difference(family, policy, "golden", budget) if golden else None,
            self._by_entropy(family, policy, budget),
        )

    def _by_entropy(self, family: str, policy: str, budget: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return a cell's mean losses, and the full cache's, by tenth of the full-cache entropy."""
        rows = list(self._cells[family, policy, budget].values())
        if any(row.loss_by_entropy is None for row in rows):
            return None
        lost, full = (
            np.array([getattr(row, name) for row in rows]) for name in ("loss_by_entropy", "full_loss_by_entropy")
        )
        return lost.mean(axis=0), full.mean(axis=0)

    def yardstick(self, family: str) -> str:
        """Return what says which policy is better on a family."""
        rows = [row for (name, _, _), cell in self._cells.items() if name == family for row in cell.values()]
        return yardstick(family, {name for name in YARDSTICKS if any(getattr(row, name) is not None for row in rows)})

    def better(self, family: str, one: str, other: str, budget: int) -> bool:
        """Return whether a policy beats another in a cell: the paired interval of the yardstick excludes 0."""
        metric = self.yardstick(family)
        pair = (one, other) if YARDSTICKS[metric] < 0 else (other, one)
        return beats(self.difference(family, *pair, budget, metric))

    def without_answers(self, family: str) -> tuple[int, int]:
        """Return how many traces of a family have no scored answer, of how many."""
        rows = [row for (name, _, _), cell in self._cells.items() if name == family for row in cell.values()]
        scored = {row.trace: row.scored_answers for row in rows}
        return sum(count == 0 for count in scored.values()), len(scored)
