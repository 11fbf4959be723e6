"""Perplexity of dialogues and of plain text after one eviction behind half of each trace (KVP, arXiv:2602.10238).

``perplexity/dialogue`` is KVP's OASST2-4k at any length, see :mod:`kvenv.tasks.dialogues` for how its trees become
traces; ``perplexity/text`` is plain text, see :mod:`kvenv.tasks.texts`. The paper doesn't say where a dialogue's prompt
ends, and its training cuts traces anywhere: here the first half of the tokens is the prompt.
"""

from __future__ import annotations

from kvenv.tasks.base import TaskSetting, TraceTask
from kvenv.tasks.dialogues import dialogue_source
from kvenv.tasks.texts import text_source

SCHEDULE = "prefill"


def build(setting: TaskSetting) -> list[TraceTask]:
    """Return the tasks; their data are read when their traces are asked for."""
    return [
        TraceTask("perplexity/dialogue", SCHEDULE, source=dialogue_source(setting)),
        TraceTask("perplexity/text", SCHEDULE, source=text_source(setting, SCHEDULE)),
    ]
