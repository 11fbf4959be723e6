"""Properties that try as many examples as ``KVENV_FUZZ`` says, and count them."""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, run_state_machine_as_test
from hypothesis.strategies import SearchStrategy

FACTOR = int(os.environ.get("KVENV_FUZZ", "1"))
"""How many times as many examples as ``make test`` tries."""

TRIED: Counter[str] = Counter()
"""What the test that is running has tried so far."""

CALLS = 25
"""Calls of a sequence."""


def fuzz(examples: int, **strategies: SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a property of a function of examples, to be tried so many times, and FACTOR times as many."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @wraps(check)
        def counted(*args: Any, **kwargs: Any) -> None:
            TRIED["examples"] += 1
            check(*args, **kwargs)

        return _settings(examples)(given(**strategies)(counted))

    return decorate


class Sequences(RuleBasedStateMachine):
    """Sequences of calls, counted."""

    def __init__(self) -> None:
        super().__init__()
        TRIED["examples"] += 1

    @invariant()
    def count(self) -> None:
        """Count a call."""
        TRIED["calls"] += 1


def run_sequences(machine: Callable[[], Sequences], examples: int) -> None:
    """Try so many sequences of calls, and FACTOR times as many."""
    run_state_machine_as_test(machine, settings=settings(_settings(examples), stateful_step_count=CALLS))


def _settings(examples: int) -> settings:
    return settings(max_examples=examples * FACTOR, suppress_health_check=list(HealthCheck))


def print_counts(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many examples each property tried, on which commit."""
    tried = {
        report.nodeid: dict(report.user_properties)["tried"]
        for reports in terminalreporter.stats.values()
        for report in reports
        if dict(getattr(report, "user_properties", ())).get("tried")
    }
    if not tried:
        return
    from experiments.runs import commit

    total = sum(counts["examples"] for counts in tried.values())
    terminalreporter.section(f"{total:,} examples (KVENV_FUZZ={FACTOR}), {datetime.date.today()}, commit {commit()}")
    for name, counts in sorted(tried.items()):
        told = ", ".join(f"{number:,} {what}" for what, number in sorted(counts.items(), reverse=True))
        terminalreporter.write_line(f"{name.removeprefix('tests/fuzz/')}: {told}")
