"""Print how well token identity alone tells facts that will be asked from facts that will not, by trace family.

A fact is a sentence that tells a value. At a cut it is relevant if a later sentence of the trace needs it, else it is a
decoy or stale. Every token id gets its smoothed log-odds of standing in a relevant fact, fitted on training traces. On
test traces the AUC is that of single tokens, and that of facts scored by the mean over their sentence. 0.5: identity
tells nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.cli import run
from experiments.progress import track
from kvenv.models import load_model
from kvenv.traces import FAMILIES
from kvenv.traces.family import FamilySource


@dataclass
class Arguments:
    """Print how well token identity alone tells facts that will be asked from facts that will not."""

    traces: int = 200
    """Training traces, and as many test traces, per family."""
    trace_length: int = 512
    """Tokens of a trace."""
    every: int = 64
    """Tokens between two cuts; the first and the last are as far from the ends."""


def facts(source: FamilySource, trace_id: int, every: int) -> Iterator[tuple[list[int], bool]]:
    """Yield (token ids of the telling sentence, relevant) for every fact told before every cut of a trace."""
    told: list[tuple[int, int, list[int]]] = []  # fact, end of its sentence, tokens
    used: dict[int, int] = {}  # fact -> start of the last sentence that needs it
    tokens = source[trace_id].tokens
    for sentence, start, stop in source.sentences(trace_id):
        if stop > source.trace_length:
            break
        used.update(dict.fromkeys(sentence.used, start))
        if sentence.told is not None:
            told.append((sentence.told, stop, tokens[start:stop].tolist()))
    for cut in range(every, source.trace_length - every + 1, every):
        for fact, stop, ids in told:
            if stop <= cut:
                yield ids, used.get(fact, -1) >= cut


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of (relevant, irrelevant) pairs that ``scores`` (n,) puts in order, ties counted half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive = int(labels.sum())
    if not 0 < positive < len(labels):
        raise ValueError(f"labels hold {positive} relevant of {len(labels)} facts: both kinds are needed")
    return float((ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * (len(labels) - positive)))


def relevance(family: str, tokenizer: Any, arguments: Arguments) -> tuple[float, float]:
    """Return the AUC of single tokens and of facts on a family's test traces."""
    counts = np.ones((2, len(tokenizer)))
    train, test = (
        FamilySource(
            FAMILIES[family],
            split=split,
            tokenizer=tokenizer,
            trace_length=arguments.trace_length,
            schedule="periodic",
        )
        for split in ("train", "test")
    )
    for trace_id in range(arguments.traces):
        for ids, relevant in facts(train, trace_id, arguments.every):
            np.add.at(counts[int(relevant)], ids, 1)
    shares = np.log(counts / counts.sum(1, keepdims=True))
    odds = shares[1] - shares[0]
    found = [item for trace_id in range(arguments.traces) for item in facts(test, trace_id, arguments.every)]
    single = np.concatenate([odds[ids] for ids, _ in found])
    single_labels = np.concatenate([np.full(len(ids), relevant) for ids, relevant in found])
    whole = np.array([odds[ids].mean() for ids, _ in found])
    return auc(single, single_labels), auc(whole, np.array([relevant for _, relevant in found]))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, args=argv, prog="kvenv relevance")
    if arguments.traces < 1:
        raise ValueError(f"traces {arguments.traces} must be at least 1")
    if not 1 <= arguments.every <= arguments.trace_length // 2:
        raise ValueError(f"every {arguments.every} must be from 1 to half of trace_length {arguments.trace_length}")
    tokenizer = load_model("tiny").tokenizer
    result = Table("traces", "AUC of tokens", "AUC of facts", title="relevance from token identity alone")
    for family in track(list(FAMILIES), "fitting"):
        tokens, whole = relevance(family, tokenizer, arguments)
        result.add_row(family, f"{tokens:.3f}", f"{whole:.3f}")
    Console().print(result)


if __name__ == "__main__":
    run(main)
