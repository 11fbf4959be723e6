"""From measured rows to claims: which hold, where, and by how much.

The unit is trace x training seed. A policy that nobody trained has one row per trace, which is paired with every seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.claims import LONG, SHORT
from experiments.comparison import SATURATED, Estimate, bootstrap, no_worse
from kvenv.evaluation import FULL, Row

WITHIN = 0.1
"""Nats of answer loss above the full cache's that the smallest sufficient budget may cost."""
LESS_RISE = 0.3
"""Share of imitation's loss increase on low-entropy tokens that RL is to take away."""
CLOSED = 0.8
"""Share of the gap between the best heuristic and golden-expected that learning is to close."""


class Measured:
    """Rows by policy, family and budget.

    Parameters
    ----------
    rows : sequence of Row
        Of one split, all scored from the same position.

    Raises
    ------
    ValueError
        If there are none, or they score different tokens.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        if not rows:
            raise ValueError("nothing was measured yet")
        if len({(row.score_from, row.interval, row.schedule) for row in rows}) > 1:
            raise ValueError("rows that score different tokens can't be put in one table: measure them together")
        self.families = list(dict.fromkeys(row.traces for row in rows))
        self.policies = list(dict.fromkeys(row.policy for row in rows))
        self._cells: dict[tuple[str, str, int], dict[tuple[int, int], Row]] = {}
        for row in rows:
            self._cells.setdefault((row.policy, row.traces, row.budget), {})[row.trace, row.seed] = row

    def has(self, policy: str, family: str, budget: int) -> bool:
        """Return whether a cell was measured."""
        return (policy, family, budget) in self._cells

    def values(self, policy: str, family: str, budget: int, metric: str, traces: int | None = None) -> np.ndarray:
        """Return a cell's values (traces, seeds), of the first ``traces`` traces; NaN where nothing is scored.

        Raises
        ------
        ValueError
            If it wasn't measured, or not with all seeds on all traces.
        """
        cell = self._cells.get((policy, family, budget), {})
        ids, seeds = (sorted(set(x)) for x in zip(*cell)) if cell else ([], [])
        if not cell or len(cell) < len(ids) * len(seeds):
            raise ValueError(f"policy {policy!r} was not measured on all traces of {family!r} at budget {budget}")
        return np.array([[getattr(cell[i, s], metric) for s in seeds] for i in ids[:traces]], dtype=np.float64)

    def count(self, policy: str, family: str, budget: int) -> int:
        """Return on how many traces a cell was measured."""
        return len({trace for trace, _ in self._cells.get((policy, family, budget), {})})

    def mean(self, policy: str, family: str, budget: int, metric: str = "answer_loss") -> float:
        """Return a cell's mean."""
        return float(np.nanmean(self.values(policy, family, budget, metric)))

    def difference(
        self, one: tuple[str, int], other: tuple[str, int], family: str, metric: str = "answer_loss"
    ) -> Estimate:
        """Return the paired difference of two (policy, budget) on a family: one minus other."""
        return self.pooled([(one, other, family)], metric)

    def pooled(
        self, cells: Iterable[tuple[tuple[str, int], tuple[str, int], str]], metric: str = "answer_loss"
    ) -> Estimate:
        """Return the paired difference over the traces of several (one, other, family)."""
        parts = []
        for one, other, family in cells:
            traces = min(self.count(policy, family, budget) for policy, budget in (one, other))
            pair = [self.values(policy, family, budget, metric, traces) for policy, budget in (one, other)]
            parts.append(pair[0] - pair[1])
        values = np.concatenate(parts)
        return bootstrap(values[~np.isnan(values).any(axis=1)])


@dataclass(frozen=True)
class Claim:
    """What was claimed, and what was found.

    Attributes
    ----------
    name, says : str
        The claim.
    held : bool or None
        Whether it held in all cells that count; None for a table that claims nothing.
    headings : list of str
        Of the table.
    table : list of list
        Strings and numbers.
    note : str
        What the table doesn't say.
    """

    name: str
    says: str
    held: bool | None
    headings: list[str]
    table: list[list[Any]]
    note: str = ""


class Chosen:
    """What stands for the best in a cell, chosen on validation traces.

    Parameters
    ----------
    validation : Measured
        Validation rows.
    learned, heuristics : sequence of str
        Who can stand for the best learned policy, and for the best heuristic, where they were measured.
    """

    def __init__(self, validation: Measured, learned: Sequence[str], heuristics: Sequence[str]) -> None:
        self.validation, self._learned, self._heuristics = validation, learned, heuristics

    def learned(self, family: str, budget: int) -> str:
        """Return the best learned policy."""
        return self._best(self._learned, family, budget)

    def heuristic(self, family: str, budget: int) -> str:
        """Return the best heuristic."""
        return self._best(self._heuristics, family, budget)

    def _best(self, policies: Sequence[str], family: str, budget: int) -> str:
        measured = [policy for policy in policies if self.validation.has(policy, family, budget)]
        return min(measured, key=lambda policy: self.validation.mean(policy, family, budget))


def half_budget(test: Measured, chosen: Chosen, budgets: Sequence[int]) -> Claim:
    """The best learned policy at half the budget is no worse than the best heuristic, wherever golden shows room."""
    table, held = [], True
    for family in test.families:
        for budget in (b for b in budgets if b // 2 in budgets):
            half, rival = budget // 2, chosen.heuristic(family, budget)
            golden = test.difference(("golden", half), (rival, budget), family)
            learned = chosen.learned(family, half)
            loss = test.difference((learned, half), (rival, budget), family)
            lost = test.difference((rival, budget), (learned, half), family, "answer_accuracy")
            room = golden.high < 0 and -golden.mean > SATURATED
            fine = no_worse(loss, lost)
            held &= fine or not room
            table.append([
                family, budget, f"{rival} {test.mean(rival, family, budget):.3f}",
                f"{learned} {test.mean(learned, family, half):.3f}", _interval(loss), f"{lost.mean:+.3f}",
                f"{test.mean('golden', family, half):.3f}", ("yes" if fine else "no") if room else "no room",
            ])  # fmt: skip
    headings = [
        "traces", "budget", "best heuristic", "learned at half", "difference", "accuracy lost", "golden at half",
        "holds",
    ]  # fmt: skip
    says = "Where golden at half the budget beats the best heuristic, the best learned policy at half is no worse."
    return Claim("Half the budget", says, held, headings, table)


def smallest_budgets(test: Measured, budgets: Sequence[int]) -> Claim:
    """The smallest measured budget at which a policy stays within 0.1 nat of the full cache."""
    table = []
    for policy in test.policies:
        line: list[Any] = [policy]
        for family in test.families:
            measured = [budget for budget in sorted(budgets) if test.has(policy, family, budget)]
            enough = [
                budget
                for budget in measured
                if test.mean(policy, family, budget) - test.mean(FULL, family, budget) <= WITHIN
            ]
            line.append(enough[0] if enough else f"> {measured[-1]}" if measured else "-")
        table.append(line)
    says = f"The smallest budget within {WITHIN} nat of the full cache's answer loss."
    return Claim("Smallest budget", says, None, ["policy", *test.families], table)


def rl_adds(test: Measured, budgets: Sequence[int]) -> Claim:
    """GRPO from imitation takes away 30 % of imitation's loss increase on low-entropy tokens, LM loss no worse."""
    table, held = [], True
    for budget in budgets:
        cells = [(("grpo", budget), ("imitation", budget), family) for family in test.families]
        change, lm = (test.pooled(cells, metric) for metric in ("low_entropy_increase", "lm_loss"))
        rises = [test.mean("imitation", family, budget, "low_entropy_increase") for family in test.families]
        before = float(np.mean(rises))
        fine = -change.mean >= LESS_RISE * before and change.high < 0 and lm.bound < 0.02
        held &= fine
        share = f"{-change.mean / before:.0%}" if before > 0 else "-"
        table.append([budget, f"{before:.3f}", _interval(change), share, _interval(lm), "yes" if fine else "no"])
    headings = ["budget", "imitation's low-entropy increase", "grpo minus imitation", "taken away", "LM loss", "holds"]
    says = f"grpo from imitation lowers low_entropy_increase by at least {LESS_RISE:.0%}, total LM loss no worse."
    return Claim("RL adds to SL", says, held, headings, table)


def gap_closed(test: Measured, chosen: Chosen, budgets: Sequence[int]) -> Claim:
    """The best learned policy closes 80 % of the gap between the best heuristic and golden-expected."""
    table, shares = [], []
    for family in test.families:
        for budget in budgets:
            rival, learned = chosen.heuristic(family, budget), chosen.learned(family, budget)
            paired = {}
            for ceiling in ("golden-expected", "golden"):
                traces = test.count(ceiling, family, budget)
                high, low, own = (
                    float(np.nanmean(test.values(policy, family, budget, "answer_loss", traces)))
                    for policy in (rival, ceiling, learned)
                )
                paired[ceiling] = ((high - own) / (high - low), low, traces)
            saturated = test.difference((rival, budget), ("golden", budget), family).mean <= SATURATED
            share, low, traces = paired["golden-expected"]
            if not saturated:
                shares.append(share)
            table.append([
                family, budget, f"{rival} {test.mean(rival, family, budget):.3f}",
                f"{learned} {test.mean(learned, family, budget):.3f}", f"{low:.3f}",
                f"{test.mean('golden', family, budget):.3f}", "saturated" if saturated else f"{share:.0%}",
                f"{paired['golden'][0]:.0%}",
            ])  # fmt: skip
    mean = float(np.mean(shares)) if shares else 0.0
    headings = [
        "traces", "budget", "best heuristic", "best learned", "golden-expected", "golden", "closed", "to golden",
    ]  # fmt: skip
    says = f"Over unsaturated cells, the best learned policy closes {CLOSED:.0%} of the gap to golden-expected."
    note = (
        f"Mean over {len(shares)} unsaturated cells: {mean:.0%}. golden-expected, and what is closed to it, "
        f"on the first {traces} traces of each family."
    )
    return Claim("Gap closed", says, mean >= CLOSED, headings, table, note)


def kvp_alone(test: Measured, rivals: Sequence[str], budgets: Sequence[int]) -> Claim:
    """KVP, which sees keys and values only, beats every heuristic that sees no attention."""
    table, held = [], True
    for family in test.families:
        for budget in budgets:
            best = min(rivals, key=lambda rival: test.mean(rival, family, budget))
            differences = {rival: test.difference(("kvp", budget), (rival, budget), family) for rival in rivals}
            saturated = test.difference((best, budget), ("golden", budget), family).mean <= SATURATED
            lost = [rival for rival, difference in differences.items() if difference.high >= 0]
            held &= saturated or not lost
            table.append([
                family, budget, f"{test.mean('kvp', family, budget):.3f}",
                f"{best} {test.mean(best, family, budget):.3f}", _interval(differences[best]),
                "saturated" if saturated else f"not {', '.join(lost)}" if lost else "yes",
            ])  # fmt: skip
    headings = ["traces", "budget", "kvp", "best attention-free", "difference", "beats all"]
    says = f"kvp beats every attention-free heuristic ({', '.join(rivals)}) in every unsaturated cell."
    return Claim("KVP sees no attention", says, held, headings, table)


def transfer(test: Measured, far: Measured, rivals: Sequence[str], budget: int) -> Claim:
    """KVP trained on one family and tested on the others, and trained on short traces and tested on long ones."""
    trained = [policy for policy in test.policies if policy.startswith("kvp-")]
    table = [
        [policy, "512", *(f"{test.mean(policy, family, budget):.3f}" for family in test.families)]
        for policy in ("kvp", *trained)
    ]
    best = {family: min(rivals, key=lambda rival: test.mean(rival, family, budget)) for family in test.families}
    table.append(["best attention-free", "512", *(f"{r} {test.mean(r, f, budget):.3f}" for f, r in best.items())])
    table += [
        [policy, f"{LONG}", *(f"{far.mean(policy, family, budget):.3f}" for family in far.families)]
        for policy in far.policies
    ]
    says = f"Answer loss at budget {budget} of kvp trained on one family (kvp-FAMILY) or {SHORT} tokens (kvp-short)."
    return Claim("KVP transfers", says, None, ["policy", "tokens", *test.families], table)


def ppo_learns(test: Measured, budgets: Sequence[int]) -> Claim:
    """PPO beats what it started from, and random."""
    table, held = [], True
    for budget in budgets:
        for rival in ("ppo-initial", "random"):
            change = test.pooled([(("ppo", budget), (rival, budget), family) for family in test.families])
            held &= change.high < 0
            own = float(np.mean([test.mean("ppo", family, budget) for family in test.families]))
            table.append([budget, rival, f"{own:.3f}", _interval(change), "yes" if change.high < 0 else "no"])
    headings = ["budget", "against", "ppo", "difference", "beats"]
    return Claim("PPO learns", "ppo beats its initialisation and random, over all families.", held, headings, table)


def summary(test: Measured, budgets: Sequence[int]) -> Claim:
    """Mean answer loss of every policy."""
    cells = [(family, budget) for family in test.families for budget in budgets]
    table = [
        [policy, *(f"{test.mean(policy, *cell):.3f}" if test.has(policy, *cell) else "-" for cell in cells)]
        for policy in test.policies
    ]
    headings = ["policy", *(f"{family} {budget}" for family, budget in cells)]
    return Claim("Answer loss", "In nats, by traces and budget.", None, headings, table)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
