"""Print how well a model answers held-out traces with the full cache, by family and trace length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from experiments.cli import run
from experiments.progress import track
from kvenv.models import load_model
from kvenv.traces import FAMILIES, load_traces


@dataclass(frozen=True)
class Score:
    """Means over the answers, or the targets, of one family's traces."""

    answers: int
    accuracy: float
    answer_loss: float
    lm_loss: float


@torch.no_grad()
def quality(
    model: Any, tokenizer: Any, family: str, *, trace_length: int, traces: int, split: str = "test", rows: int = 8
) -> Score:
    """Score a model on the first ``traces`` traces of a family.

    Parameters
    ----------
    model, tokenizer : transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
        The model, on any device.
    family, split : str
        Which traces.
    trace_length, traces, rows : int
        Tokens of a trace, number of traces, traces per forward pass.

    Returns
    -------
    Score
        An answer counts as right if every token of it is the most likely one; losses in nats per token.
    """
    source = load_traces(family, split=split, tokenizer=tokenizer, trace_length=trace_length)
    right, answer_nll, total = [], [], []
    for begin in range(0, traces, rows):
        batch = [source[i] for i in range(begin, min(begin + rows, traces))]
        tokens = torch.from_numpy(np.stack([trace.tokens for trace in batch])).to(model.device)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").cpu()
        hit = (logits.argmax(-1) == tokens[:, 1:]).cpu()
        total.append(nll.mean(1))
        for row, trace in enumerate(batch):
            for start, stop in trace.answers:
                right.append(bool(hit[row, start - 1 : stop - 1].all()))
                answer_nll.append(nll[row, start - 1 : stop - 1])
    return Score(len(right), float(np.mean(right)), float(torch.cat(answer_nll).mean()), float(torch.cat(total).mean()))


@dataclass
class Arguments:
    """Print how well a model answers held-out traces with the full cache."""

    model: str = "tiny"
    """The bundled model ("tiny"), a directory, or a hub id."""
    lengths: tuple[int, ...] = (512, 1024)
    """Trace lengths in tokens."""
    traces: int = 100
    """Traces per family and length."""
    split: str = "test"
    """Split of the traces: train, validation or test."""
    device: str = "cpu"
    """PyTorch device."""


def table(model: Any, tokenizer: Any, arguments: Arguments) -> Table:
    """Return the quality table of a model."""
    result = Table("traces", "length", "answers", "accuracy", "answer loss", "LM loss")
    cells = [(length, family) for length in arguments.lengths for family in FAMILIES]
    for length, family in track(cells, "evaluating"):
        score = quality(model, tokenizer, family, trace_length=length, traces=arguments.traces, split=arguments.split)
        values = (f"{score.accuracy:.3f}", f"{score.answer_loss:.3f}", f"{score.lm_loss:.3f}")
        result.add_row(family, str(length), str(score.answers), *values)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, args=argv, prog="kvenv quality")
    if arguments.traces < 1:
        raise ValueError(f"traces {arguments.traces} must be at least 1")
    loaded = load_model(arguments.model, device=arguments.device)
    for length in arguments.lengths:
        loaded.check_length(length)
    Console().print(table(loaded.model, loaded.tokenizer, arguments))


if __name__ == "__main__":
    run(main)
