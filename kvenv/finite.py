"""NaN and infinity: what has no number is told with the trace that it came from, before anybody learns from it.

Rollouts collect flags on the device and look at them once, at their end: no step and no decision waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def check_finite(what: str, values: Tensor | np.ndarray, names: Callable[[], Sequence[str]]) -> None:
    """Refuse numbers that are NaN or infinite; waits for the device.

    Parameters
    ----------
    what : str
        What they are, in the plural.
    values : Tensor or array (N, ...)
        Numbers of N traces.
    names : callable
        Returns the names of the N traces; called only if there is something to tell.

    Raises
    ------
    FloatingPointError
        Naming the traces.
    """
    # numpy's test is twenty times as fast as PyTorch's on a CPU.
    finite: np.ndarray = np.isfinite(values) if isinstance(values, np.ndarray) else values.isfinite().cpu().numpy()
    if not finite.all():
        lost = [not bool(row.all()) for row in finite]
        raise FloatingPointError(f"{what} are NaN or infinite on {_traces(names(), lost)}")


def check_run(policy: str, names: Sequence[str], lost: Tensor, unranked: Tensor | None) -> None:
    """Refuse a run of N traces in which the LLM's numbers or the policy's were none; waits for the device once.

    Parameters
    ----------
    policy : str
        Who evicted.
    names : sequence of str
        Of the N traces.
    lost : Tensor (N,) bool
        Where what the LLM predicts, its logits or losses, was NaN or infinite.
    unranked : Tensor (L, N) bool or None
        Where the policy ranked candidates by NaN; None if nobody did.

    Raises
    ------
    FloatingPointError
        Naming the traces, and the first layer of NaN priorities.
    """
    flags = lost[None] if unranked is None else torch.cat([lost[None], unranked])
    rows: list[list[bool]] = flags.cpu().tolist()
    said = []
    if any(rows[0]):
        said.append(f"the LLM's logits are NaN or infinite on {_traces(names, rows[0])}")
    if first := next(((layer, row) for layer, row in enumerate(rows[1:]) if any(row)), None):
        said.append(f"policy {policy!r} ranks pairs by NaN on {_traces(names, first[1])}, first in layer {first[0]}")
    if said:
        raise FloatingPointError("; ".join(said))


def lost_rows(nll: Tensor, entropy: Tensor) -> Tensor:
    """Return the rows (N,) in which a loss or an entropy (N, S) is NaN or infinite; nothing waits."""
    return ~(nll.isfinite() & entropy.isfinite()).all(dim=1)


def _traces(names: Sequence[str], flags: Sequence[bool]) -> str:
    """Return the names of flagged traces, each once, the first few."""
    told = list(dict.fromkeys(repr(name) for name, flag in zip(names, flags, strict=True) if flag))
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    return f"trace{'s' if len(told) > 1 else ''} {', '.join(told[:3])}{more}"
