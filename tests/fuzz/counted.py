"""Properties that try as many examples as ``KVENV_FUZZ`` says, and count them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

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
