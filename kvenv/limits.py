"""What can be decoded and observed: the numbers an environment is made with, checked before anything is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvenv.checks import check_integer
from kvenv.layerwise import check_budget
from kvenv.state import Protection
from kvenv.traces import Trace, TraceSource


@dataclass(frozen=True)
class Limits:
    """Budget, windows and lengths of an environment's episodes.

    Attributes
    ----------
    trace_length : int
        Longest trace in tokens.
    budget, interval : int
        B and W.
    periodic : bool
        Evict every W tokens, rather than once after the prompt.
    protection : Protection
        Pairs that are never evicted.

    Raises
    ------
    ValueError
        If a number means nothing, or the protected pairs alone exceed the budget.
    """

    trace_length: int
    budget: int
    interval: int
    periodic: bool
    protection: Protection

    def __post_init__(self) -> None:
        protection = self.protection
        for name, value, least in (
            ("budget", self.budget, 1),
            ("interval", self.interval, 1),
            ("trace_length", self.trace_length, 2),
        ):
            check_integer(name, value, least)
        if self.budget < protection.sinks + protection.recent:
            raise ValueError(
                f"budget {self.budget} is less than the protected pairs, sinks {protection.sinks} + recent "
                f"{protection.recent}: raise budget or protect less"
            )

    def capacity(self, source: TraceSource) -> int:
        """Return C, the slots of a (layer, KV head).

        Raises
        ------
        ValueError
            If no trace of this length has anything to evict.
        """
        capacity = self.budget + self.interval if self.periodic else source.max_prompt_length
        if capacity <= self.budget:
            raise ValueError(
                f"budget {self.budget} holds the longest prompt of {source.name!r}, {capacity} tokens: under schedule "
                "'prefill' it must be smaller"
            )
        if self.trace_length < capacity + 2:
            what = "budget + interval" if self.periodic else "the longest prompt"
            raise ValueError(
                f"trace_length {self.trace_length} is too short: with {what} = {capacity} an episode needs at least "
                f"{capacity + 2} tokens"
            )
        return capacity

    def anchor(self, trace: Trace, budget: int) -> int:
        """Return the position of a trace's first decision, with a budget of its own."""
        return budget + self.interval if self.periodic else trace.prompt_length

    def check_trace(self, trace: Trace, budget: int, capacity: int) -> None:
        """Refuse a trace that can't be decoded with a budget of its own.

        Raises
        ------
        ValueError
            Naming trace, lengths and budget.
        """
        name, length, anchor = f"trace {trace.name!r}", len(trace.tokens), self.anchor(trace, budget)
        if length > self.trace_length:
            raise ValueError(f"{name} has {length} tokens, more than trace_length {self.trace_length}")
        check_budget(budget, self.protection, trace, self.interval)
        if not self.periodic and not budget < anchor <= capacity:
            raise ValueError(
                f"{name} has a prompt of {anchor} tokens: schedule 'prefill' needs more than budget {budget} and at "
                f"most the {capacity} slots that were made for the longest prompt"
            )
        if length < anchor + 2:
            what = f"budget {budget} and interval {self.interval}" if self.periodic else f"a prompt of {anchor}"
            raise ValueError(f"{name} has {length} tokens: with {what} it needs at least {anchor + 2}")

    def check_traces(self, traces: Sequence[Trace]) -> None:
        """Refuse traces if one of them can't be decoded with the budget under the schedule ``periodic``.

        Raises
        ------
        ValueError
            Naming the first, and how many are too short.
        """
        least = self.budget + self.interval + 2
        short = [trace for trace in traces if len(trace.tokens) < least]
        if short:
            raise ValueError(
                f"trace {short[0].name!r} has {len(short[0].tokens)} tokens: with budget {self.budget} and interval "
                f"{self.interval} it needs at least {least}, and {len(short)} of {len(traces)} traces have fewer; "
                f"choose smaller budgets, or leave out traces shorter than {least} tokens"
            )
        for trace in traces:
            self.check_trace(trace, self.budget, self.budget + self.interval)


def observation_nbytes(layers: int, heads: int, slots: int, width: int) -> int:
    """Return the bytes of one row's observation: F float32, an int64 position and an int8 mask per slot.

    Parameters
    ----------
    layers, heads, slots, width : int
        L, H, C, F.
    """
    return layers * heads * slots * (4 * width + 8 + 1)


def refuse_what_cannot_fit(rows: int, nbytes: int, name: str, device: torch.device) -> None:
    """Refuse observations that memory can't hold, before anything is allocated.

    Gymnasium's ``Box`` keeps the bounds of every element, for one row and for all: on the host that is 2.5 times the
    observation.

    Parameters
    ----------
    rows : int
        N.
    nbytes : int
        Bytes of one row's observation.
    name : str
        Name of the feature set.
    device : torch.device
        Where observations are computed.

    Raises
    ------
    ValueError
        If N observations exceed the device's memory, or with their bounds the host's.
    """
    needs = {"this machine": (int(3.5 * nbytes * (rows + 1)), _host_memory())}
    if device.type == "cuda":
        needs[str(device)] = (nbytes * rows, torch.cuda.get_device_properties(device).total_memory)
    for where, (needed, memory) in needs.items():
        if needed > memory:
            raise ValueError(
                f"observations of features {name!r} take {nbytes / 1e6:,.1f} MB a row, {needed / 1e9:,.1f} GB for "
                f"{rows} rows, and {where} has {memory / 1e9:,.1f} GB: choose features='stats', a smaller budget or "
                "fewer rows"
            )


def _host_memory() -> float:
    """Return the bytes of the host's memory, where the system tells."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
