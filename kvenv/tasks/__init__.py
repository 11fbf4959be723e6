"""The benchmarks of the papers: prompts to be answered and traces to be scored, for any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from kvenv.tasks import stand_ins
from kvenv.tasks.base import (
    Builder,
    Choice,
    ChoiceTask,
    Examples,
    Question,
    QuestionTask,
    Score,
    Task,
    TaskSetting,
    TraceTask,
)

__all__ = [
    "TASKS",
    "Choice",
    "ChoiceTask",
    "Examples",
    "Question",
    "QuestionTask",
    "Score",
    "Task",
    "TaskSetting",
    "TraceTask",
    "load_tasks",
]

TASKS = {
    "ruler": "kvenv.tasks.ruler",
    "perplexity": "kvenv.tasks.perplexity",
    "reasoning": "kvenv.tasks.reasoning",
    "zeroshot": "kvenv.tasks.zeroshot",
    "entropy": "kvenv.tasks.entropy",
}
"""Benchmarks by name: modules with a ``build(setting)`` that makes their tasks."""


def load_tasks(name: str, setting: TaskSetting) -> Sequence[Task]:
    """Return the tasks of a benchmark, or the one that is named, e.g. ``"ruler"`` or ``"ruler/vt"``.

    A tokenizer that can't spell plain text gets their stand-ins, see :mod:`kvenv.tasks.stand_ins`; their notes say so.

    Raises
    ------
    ValueError
        If the name is unknown; the message lists the known ones. If a task lacks data; the message says which tasks
        lack what, and which run without it.
    """
    benchmark, _, one = name.partition("/")
    if benchmark not in TASKS:
        raise ValueError(f"unknown task {name!r}: known are {', '.join(TASKS)}")
    spells = stand_ins.spells_text(setting.tokenizer)
    build: Builder = import_module(TASKS[benchmark]).build if spells else stand_ins.BUILDERS[benchmark]
    tasks = build(setting)
    found = [task for task in tasks if not one or task.name == name]
    if not found:
        raise ValueError(f"unknown task {name!r}: {benchmark} has {', '.join(task.name for task in tasks)}")
    _refuse_missing(name, found)
    return found


def _refuse_missing(name: str, tasks: Sequence[Task]) -> None:
    """Refuse tasks that lack something, in one message."""
    if not any(task.missing for task in tasks):
        return
    names: dict[str, list[str]] = {}
    for task in tasks:
        names.setdefault(task.missing, []).append(task.name)
    ready = names.pop("", [])
    lacks = "; ".join(f"{', '.join(lacking)}: {missing}" for missing, lacking in names.items())
    raise ValueError(f"{name} can't be run, something is missing. {lacks}. Ready are: {', '.join(ready) or 'none'}")
