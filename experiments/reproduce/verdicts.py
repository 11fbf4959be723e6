"""From measured rows to claims: which hold, where, and by how much.

The unit is trace x training seed. A policy that nobody trained has one row per trace, which is paired with every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.comparison import (
    NO_WORSE_LOSS,
    RESAMPLES,
    SATURATED,
    Comparison,
    Estimate,
    beats,
    bootstrap,
    estimate,
    no_worse,
    weights,
)
from experiments.reproduce.plan import LONG, SHORT
from kvenv.evaluation import FULL

WITHIN = 0.1
"""Nats of answer loss above the full cache's that the smallest sufficient budget may cost."""
LESS_RISE = 0.3
"""Share of imitation's loss increase on low-entropy tokens that RL is to take away."""
CLOSED = 0.8
"""Share of the gap between the best heuristic and golden-expected that learning is to close."""


class Measured(Comparison):
    """Rows of trained policies, whose seeds are those of their trainings, and of others, which have one row per trace.

    Policies may have been measured on different numbers of traces: compared are those that both have.
    """

    def count(self, family: str, policy: str, budget: int) -> int:
        """Return on how many traces a cell was measured."""
        return len(self.values(family, policy, budget, "lm_loss"))

    def mean(self, family: str, policy: str, budget: int, metric: str = "answer_loss") -> float:
        """Return a cell's mean."""
        return float(np.nanmean(self.values(family, policy, budget, metric)))

    def common(self, cells: Sequence[tuple[str, str, int]], metric: str = "answer_loss") -> list[np.ndarray]:
        """Return the values (traces, seeds) of cells (family, policy, budget) on the traces that all of them score."""
        traces = min(self.count(*cell) for cell in cells)
        values = [self.values(*cell, metric)[:traces] for cell in cells]
        good = ~np.any([np.isnan(x).any(axis=1) for x in values], axis=0)
        return [x[good] for x in values]

    def change(
        self, one: tuple[str, int], other: tuple[str, int], families: Sequence[str], metric: str = "answer_loss"
    ) -> Estimate:
        """Return the paired difference of two (policy, budget) over the traces of families: one minus other."""
        pairs = [self.common([(family, *one), (family, *other)], metric) for family in families]
        return bootstrap(np.concatenate([pair[0] - pair[1] for pair in pairs]), shared_seeds=True)


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
        measured = [policy for policy in policies if self.validation.has(family, policy, budget)]
        return min(measured, key=lambda policy: self.validation.mean(family, policy, budget))


def half_budget(test: Measured, chosen: Chosen, budgets: Sequence[int]) -> Claim:
    """The best learned policy at half the budget is no worse than the best heuristic, wherever golden shows room."""
    table, verdicts = [], []
    rooms = dict.fromkeys(test.families, 0)
    for family in test.families:
        for budget in (b for b in budgets if b // 2 in budgets):
            half, rival = budget // 2, chosen.heuristic(family, budget)
            golden = test.change(("golden", half), (rival, budget), [family])
            learned = chosen.learned(family, half)
            loss = test.change((learned, half), (rival, budget), [family])
            lost = test.change((rival, budget), (learned, half), [family], "answer_accuracy")
            fine = no_worse(loss, lost)
            if room := beats(golden) and -golden.mean > SATURATED:
                verdicts.append(fine)
                rooms[family] += 1
            table.append([
                family, budget, f"{rival} {test.mean(family, rival, budget):.3f}",
                f"{learned} {test.mean(family, learned, half):.3f}", _interval(loss), f"{lost.mean:+.3f}",
                f"{test.mean(family, 'golden', half):.3f}", ("yes" if fine else "no") if room else "no room",
            ])  # fmt: skip
    headings = [
        "traces", "budget", "best heuristic", "learned at half", "difference", "accuracy lost", "golden at half",
        "holds",
    ]  # fmt: skip
    says = "Where golden at half the budget beats the best heuristic, the best learned policy at half is no worse."
    note = f"Budgets with room: {', '.join(f'{family} {count}' for family, count in rooms.items())}."
    return Claim("Half the budget", says, _all(verdicts), headings, table, note)


def smallest_budgets(test: Measured, budgets: Sequence[int]) -> Claim:
    """The smallest measured budget at which a policy stays within 0.1 nat of the full cache."""
    table = []
    for policy in test.policies:
        line: list[Any] = [policy]
        for family in test.families:
            measured = [budget for budget in sorted(budgets) if test.has(family, policy, budget)]
            enough = [
                budget
                for budget in measured
                if test.mean(family, policy, budget) - test.mean(family, FULL, budget) <= WITHIN
            ]
            line.append(enough[0] if enough else f"> {measured[-1]}" if measured else "-")
        table.append(line)
    says = f"The smallest budget within {WITHIN} nat of the full cache's answer loss."
    return Claim("Smallest budget", says, None, ["policy", *test.families], table, _on_fewer(test, budgets))


def rl_adds(test: Measured, budgets: Sequence[int]) -> Claim:
    """GRPO from imitation takes away 30 % of imitation's loss increase on low-entropy tokens, LM loss no worse."""
    table, verdicts = [], []
    for budget in budgets:
        one, other = ("grpo", budget), ("imitation", budget)
        rise = "low_entropy_increase"
        before = test.change(other, (FULL, budget), test.families, rise)
        change, lm = (test.change(one, other, test.families, metric) for metric in (rise, "lm_loss"))
        fine = -change.mean >= LESS_RISE * before.mean and beats(change) and lm.bound < NO_WORSE_LOSS
        if rises := before.low > 0:
            verdicts.append(fine)
        share = f"{-change.mean / before.mean:.0%}" if rises else "-"
        verdict = ("yes" if fine else "no") if rises else "nothing to take"
        table.append([budget, f"{before.mean:.3f}", _interval(change), share, _interval(lm), verdict])
    headings = ["budget", "imitation's low-entropy increase", "grpo minus imitation", "taken away", "LM loss", "holds"]
    says = f"grpo from imitation lowers low_entropy_increase by at least {LESS_RISE:.0%}, total LM loss no worse."
    return Claim("RL adds to SL", says, _all(verdicts), headings, table)


def gap_closed(test: Measured, chosen: Chosen, budgets: Sequence[int]) -> Claim:
    """The best learned policy closes 80 % of the gap between the best heuristic and golden-expected."""
    table, closed = [], []
    for family in test.families:
        for budget in budgets:
            rival, learned = chosen.heuristic(family, budget), chosen.learned(family, budget)
            saturated = test.change((rival, budget), ("golden", budget), [family]).mean <= SATURATED
            shares = []
            for ceiling in ("golden-expected", "golden"):
                high, low, own = test.common([(family, policy, budget) for policy in (rival, ceiling, learned)])
                # Without a gap there is no share of it.
                shares.append(share_closed(high, low, own) if (high - low).mean() > SATURATED else None)
            if not saturated and shares[0] is not None:
                closed.append(shares[0][1])
            table.append([
                family, budget, f"{rival} {test.mean(family, rival, budget):.3f}",
                f"{learned} {test.mean(family, learned, budget):.3f}",
                *(f"{test.mean(family, ceiling, budget):.3f}" for ceiling in ("golden-expected", "golden")),
                *("saturated" if saturated else "no gap" if share is None else _share(share[0]) for share in shares),
            ])  # fmt: skip
    headings = [
        "traces", "budget", "best heuristic", "best learned", "golden-expected", "golden", "closed", "to golden",
    ]  # fmt: skip
    says = f"Over unsaturated cells, the best learned policy closes {CLOSED:.0%} of the gap to golden-expected."
    # More than all of one gap makes up for nothing in another.
    mean = np.mean([np.minimum(share, 1.0) for share in closed], axis=0) if closed else np.zeros(1)
    overall = estimate(float(mean[0]), mean)
    note = (
        f"Mean over {len(closed)} unsaturated cells, a share above 100 % counting as 100 %: {_share(overall)}. "
        + _on_fewer(test, budgets)
    )
    return Claim("Gap closed", says, overall.mean >= CLOSED if closed else None, headings, table, note)


def share_closed(high: np.ndarray, low: np.ndarray, own: np.ndarray) -> tuple[Estimate, np.ndarray]:
    """Return which share of the gap between two means a third one closes.

    Parameters
    ----------
    high, low, own : array (traces, seeds)
        Losses of the worse, the better and who is between them, on the same traces; one of them may have more seeds.

    Returns
    -------
    Estimate
        Of (high - own) / (high - low).
    array (1 + resamples,)
        That share, and its bootstrap samples, in which all cells of as many seeds draw the same seeds.
    """
    rng = np.random.default_rng(0)
    seeds = np.concatenate([np.full((1, own.shape[1]), 1 / own.shape[1]), weights(rng, RESAMPLES, own.shape[1])])
    traces = np.concatenate([np.full((1, len(own)), 1 / len(own)), weights(rng, RESAMPLES, len(own))])
    above, below = ((traces @ x).mean(axis=1) for x in (high, low))
    share = (above - ((traces @ own) * seeds).sum(axis=1)) / (above - below)
    return estimate(float(share[0]), share[1:]), share


def kvp_alone(test: Measured, rivals: Sequence[str], budgets: Sequence[int]) -> Claim:
    """KVP, which sees keys and values only, beats every heuristic that sees no attention."""
    table, verdicts = [], []
    for family in test.families:
        for budget in budgets:
            best = min(rivals, key=lambda rival: test.mean(family, rival, budget))
            differences = {rival: test.change(("kvp", budget), (rival, budget), [family]) for rival in rivals}
            saturated = test.change((best, budget), ("golden", budget), [family]).mean <= SATURATED
            lost = [rival for rival, difference in differences.items() if not beats(difference)]
            if not saturated:
                verdicts.append(not lost)
            table.append([
                family, budget, f"{test.mean(family, 'kvp', budget):.3f}",
                f"{best} {test.mean(family, best, budget):.3f}", _interval(differences[best]),
                "saturated" if saturated else f"not {', '.join(lost)}" if lost else "yes",
            ])  # fmt: skip
    headings = ["traces", "budget", "kvp", "best attention-free", "difference", "beats all"]
    says = f"kvp beats every attention-free heuristic ({', '.join(rivals)}) in every unsaturated cell."
    return Claim("KVP sees no attention", says, _all(verdicts), headings, table)


def transfer(test: Measured, far: Measured, rivals: Sequence[str], budget: int) -> Claim:
    """KVP trained on one family and tested on the others, and trained on short traces and tested on long ones."""
    trained = [policy for policy in test.policies if policy.startswith("kvp-")]
    table = [
        [policy, "512", *(f"{test.mean(family, policy, budget):.3f}" for family in test.families)]
        for policy in ("kvp", *trained)
    ]
    best = {family: min(rivals, key=lambda rival: test.mean(family, rival, budget)) for family in test.families}
    table.append(["best attention-free", "512", *(f"{r} {test.mean(f, r, budget):.3f}" for f, r in best.items())])
    table += [
        [policy, f"{LONG}", *(f"{far.mean(family, policy, budget):.3f}" for family in far.families)]
        for policy in far.policies
    ]
    says = f"Answer loss at budget {budget} of kvp trained on one family (kvp-FAMILY) or {SHORT} tokens (kvp-short)."
    return Claim("KVP transfers", says, None, ["policy", "tokens", *test.families], table)


def ppo_learns(test: Measured, budgets: Sequence[int]) -> Claim:
    """PPO beats what it started from, and random."""
    table, verdicts = [], []
    for budget in budgets:
        for rival in ("ppo-initial", "random"):
            change = test.change(("ppo", budget), (rival, budget), test.families)
            verdicts.append(beats(change))
            own = float(np.mean([test.mean(family, "ppo", budget) for family in test.families]))
            table.append([budget, rival, f"{own:.3f}", _interval(change), "yes" if beats(change) else "no"])
    headings = ["budget", "against", "ppo", "difference", "beats"]
    says = "ppo beats its initialisation and random, over all families."
    return Claim("PPO learns", says, _all(verdicts), headings, table)


def summary(test: Measured, budgets: Sequence[int]) -> Claim:
    """Mean answer loss of every policy."""
    cells = [(family, budget) for family in test.families for budget in budgets]
    table = [
        [policy, *(f"{test.mean(f, policy, b):.3f}" if test.has(f, policy, b) else "-" for f, b in cells)]
        for policy in test.policies
    ]
    headings = ["policy", *(f"{family} {budget}" for family, budget in cells)]
    says = "In nats, by traces and budget."
    return Claim("Answer loss", says, None, headings, table, _on_fewer(test, budgets))


def _all(verdicts: Sequence[bool]) -> bool | None:
    """Return whether all verdicts are good; None if nothing could be judged."""
    return all(verdicts) if verdicts else None


def _on_fewer(test: Measured, budgets: Sequence[int]) -> str:
    """Return a note on who was measured on fewer traces than the others."""
    counts = {
        policy: min(test.count(f, policy, b) for f in test.families for b in budgets if test.has(f, policy, b))
        for policy in test.policies
    }
    most = max(counts.values())
    fewer = [f"{policy} on the first {count} traces" for policy, count in counts.items() if count < most]
    return f"Measured {', '.join(fewer)} of each family, all others on {most}." if fewer else ""


def _interval(of: Estimate) -> str:
    return f"{of.mean:+.3f} [{of.low:+.3f}, {of.high:+.3f}]"


def _share(of: Estimate) -> str:
    return f"{of.mean:.0%} [{of.low:.0%}, {of.high:.0%}]"
