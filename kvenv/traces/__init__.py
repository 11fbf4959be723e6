"""Traces: token sequences to be decoded, from families of generated text or from the user's own data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvenv.checks import check_choice, check_integer
from kvenv.registry import TRACES, register_traces
from kvenv.traces.dialogue import Dialogue
from kvenv.traces.family import Family, FamilySource
from kvenv.traces.mixture import MixtureSource
from kvenv.traces.reasoning import Reasoning
from kvenv.traces.recall import Recall
from kvenv.traces.source import Trace, TraceSource
from kvenv.traces.tracking import Tracking
from kvenv.traces.user import FunctionSource, read_dataset, read_jsonl, read_text
from kvenv.traces.words import SPLITS, vocabulary

__all__ = ["FAMILIES", "SCHEDULES", "SPLITS", "Trace", "TraceSource", "load_traces", "tiny_vocabulary"]

SCHEDULES = ("periodic", "prefill")
FAMILIES: dict[str, Any] = {family.name: family for family in (Recall(), Tracking(), Dialogue(), Reasoning())}
for _name, _family in FAMILIES.items():
    register_traces(_name, _family)


def tiny_vocabulary() -> list[str]:
    """Return the tokens of the bundled LLM's tokenizer, specials excluded."""
    return vocabulary([table for family in FAMILIES.values() for table in family.tables.values()])


def load_traces(
    name: str,
    *,
    split: str = "train",
    tokenizer: Any,
    trace_length: int = 512,
    schedule: str = "periodic",
) -> TraceSource:
    """Return the traces of that name.

    Parameters
    ----------
    name : str
        A family (``recall``, ``tracking``, ``dialogue``, ``reasoning``) or several joined by ``+`` (their traces come
        in turn), a name given to :func:`kvenv.register_traces`, a path ending in ``.txt`` or ``.jsonl``, or ``hf:`` and
        a Hugging Face dataset.
    split : str
        ``"train"``, ``"validation"`` or ``"test"``. A file gives the same traces for each.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        The LLM's tokenizer; None will do for traces that are token ids.
    trace_length : int
        Tokens of a trace: exactly that many for a family, at most that many for anything else.
    schedule : str
        Under ``"prefill"`` the first half of a trace without a prompt of its own is its prompt.

    Raises
    ------
    ValueError
        If an argument is unknown or the data malformed; the message says what would be right.
    FileNotFoundError
        If the path does not exist.
    """
    if not isinstance(name, str):
        raise ValueError(
            f"traces must be a name, not {type(name).__name__}: give a function a name with kvenv.register_traces"
        )
    check_choice("split", split, SPLITS)
    check_choice("schedule", schedule, SCHEDULES)
    check_integer("trace_length", trace_length, 2)
    common = {"split": split, "tokenizer": tokenizer, "trace_length": trace_length}
    if name in TRACES:
        traces = TRACES.get(name)
        if isinstance(traces, Family):
            return FamilySource(traces, schedule=schedule, **common)
        return FunctionSource(name, function=traces, **common)
    parts = name.split("+")
    if len(parts) > 1 and set(parts) <= set(FAMILIES):
        return MixtureSource([FamilySource(FAMILIES[part], schedule=schedule, **common) for part in parts])
    if name.startswith("hf:"):
        return read_dataset(name[3:], schedule=schedule, **common)
    path = Path(name)
    if path.suffix not in (".txt", ".jsonl"):
        known = ", ".join(TRACES.names())
        raise ValueError(f"unknown traces {name!r}: known are {known}, a path ending in .txt or .jsonl, hf:<dataset>")
    if not os.path.isfile(path):  # unlike Path's, it takes any name
        raise FileNotFoundError(f"traces {name!r}: no such file")
    return (read_text if path.suffix == ".txt" else read_jsonl)(path, schedule=schedule, **common)
