"""How well a policy does on validation traces while it is being trained."""

from __future__ import annotations

import matplotlib
import numpy as np

from experiments.story import follow
from kvenv.evaluation import Row, evaluate
from kvenv.layerwise import Policy
from kvenv.limits import Limits
from kvenv.models import load_model
from kvenv.state import Protection
from kvenv.traces import load_traces

METRICS = ("answer_loss", "answer_accuracy", "lm_loss", "low_entropy_increase", "agreement_with_golden")
"""Fields of a row that become ``eval/...``."""

BATCH = 16


class Validation:
    """Validation traces and the terms on which policies are measured.

    Parameters
    ----------
    model, traces, device, dtype : str
        As in :class:`kvenv.KVEvictEnv`.
    trace_length, interval, sinks, recent : int
        Likewise.
    budgets : sequence of int
        What is reported is the mean over them.
    num_traces : int
        How many traces; a mixture's families come in turn.

    Raises
    ------
    ValueError
        If a budget is impossible with one of them.
    """

    def __init__(
        self,
        *,
        model: str,
        traces: str,
        trace_length: int,
        interval: int,
        sinks: int,
        recent: int,
        budgets: tuple[int, ...],
        num_traces: int,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self.loaded = load_model(model, dtype=dtype, device=device)
        self.source = load_traces(
            traces, split="validation", tokenizer=self.loaded.tokenizer, trace_length=trace_length
        )
        self.interval, self.budgets, self.protection = interval, budgets, Protection(sinks, recent)
        self.trace_ids = range(min(num_traces, self.source.size or num_traces))
        measured = [self.source[trace_id] for trace_id in self.trace_ids]
        for budget in budgets:
            Limits(trace_length, budget, interval, True, self.protection).check_traces(measured)

    @property
    def batches(self) -> int:
        """How many batches of traces are measured."""
        return -(-len(self.trace_ids) // BATCH)

    def measure(self, policy: Policy) -> dict[str, float]:
        """Return the means over traces and budgets as ``eval/...``."""
        return means([row for batch in range(self.batches) for row in self.rows(policy, batch)])

    def rows(self, policy: Policy, batch: int) -> list[Row]:
        """Return the rows of a batch of traces."""
        cells = evaluate(
            {policy.name: policy},
            self.source,
            self.trace_ids[batch * BATCH : (batch + 1) * BATCH],
            model=self.loaded.model,
            budgets=self.budgets,
            interval=self.interval,
            protection=self.protection,
            batch_size=BATCH,
        )
        return [row for cell in cells for row in cell]

    def picture(self, policy: Policy) -> np.ndarray:
        """Return what is kept of the first trace: a line per decision, a column per token, bright if all heads do."""
        story = follow(
            policy,
            self.source,
            self.trace_ids[0],
            model=self.loaded.model,
            tokenizer=None,
            budget=self.budgets[0],
            interval=self.interval,
            protection=self.protection,
        )
        colours = matplotlib.colormaps["viridis"](story.kept)[..., :3]
        return (255 * colours).astype(np.uint8).repeat(4, axis=0)


def means(rows: list[Row]) -> dict[str, float]:
    """Return the means over rows as ``eval/...``."""
    return {f"eval/{metric}": mean for metric in METRICS if (mean := _mean(rows, metric)) is not None}


def _mean(rows: list[Row], metric: str) -> float | None:
    """Return the mean of a metric over the rows that have it; None if none has."""
    values = [value for row in rows if (value := getattr(row, metric)) is not None]
    return float(np.mean(values)) if values else None
