"""Loss after eviction by how certain the full cache was (ForesightKV, arXiv:2602.03203: certain tokens suffer most).

The traces are ``traces.jsonl`` in the directory of the data (``prompt`` and ``response``, ``text`` or ``input_ids`` a
line, as :func:`kvenv.load_traces` reads them), else plain text, see :mod:`kvenv.tasks.texts`. The paper's are reasoning
traces of the LLM itself, which aren't published: write them to the file.
"""

from __future__ import annotations

from kvenv.tasks.base import TaskSetting, TraceTask
from kvenv.tasks.texts import LazySource, text_source
from kvenv.traces.source import Trace
from kvenv.traces.user import read_jsonl

FILE = "traces.jsonl"


def build(setting: TaskSetting) -> list[TraceTask]:
    """Return the task; its data are read when its traces are asked for."""
    schedule = setting.schedule or "periodic"
    path = setting.data / FILE if setting.data else None
    if path is None or not path.exists():
        return [TraceTask("entropy/text", schedule, source=text_source(setting, schedule), entropy=True)]

    def read() -> list[Trace]:
        source = read_jsonl(
            path,
            split=setting.split,
            tokenizer=setting.tokenizer,
            trace_length=setting.length,
            schedule=schedule,
        )
        return source.traces[: setting.num_examples]

    return [TraceTask("entropy/traces", schedule, source=LazySource(str(path), setting.split, read), entropy=True)]
