"""Plain text as traces, read when the first one is asked for: naming a task needs only that task's data."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from kvenv.tasks.base import TaskSetting
from kvenv.tasks.records import Source
from kvenv.traces.source import Trace, TraceSource
from kvenv.traces.user import cut_text, read_text

# The whole training split is half a gigabyte; a twentieth of it gives more traces than anybody scores.
WIKITEXT_SPLITS = {"train": "train[:5%]", "validation": "validation", "test": "test"}


class LazySource(TraceSource):
    """Traces that are all read when one of them, or their number, is asked for.

    Parameters
    ----------
    name, split : str
        As of every source.
    read : callable
        Returns the traces, at least one.
    """

    def __init__(self, name: str, split: str, read: Callable[[], list[Trace]]) -> None:
        super().__init__(name, split)
        self._traces = cache(read)

    @property
    def size(self) -> int:  # type: ignore[override]  # asked, never set
        """How many there are."""
        return len(self._traces())

    @property
    def max_prompt_length(self) -> int:
        """The longest prompt, in tokens."""
        return max(trace.prompt_length for trace in self._traces())

    def make(self, trace_id: int) -> Trace:
        return self._traces()[trace_id]


def text_source(setting: TaskSetting, schedule: str) -> LazySource:
    """Return plain text, cut into traces of ``setting.length`` tokens.

    It is ``text.txt``, or the only ``.txt`` file, in the directory of the data, the same for every split; without a
    directory it is WikiText-103 (raw), its paragraphs joined by blank lines.

    Parameters
    ----------
    setting : TaskSetting
        What the traces are for.
    schedule : str
        Under ``"prefill"`` the first half of a trace is its prompt.

    Raises
    ------
    FileNotFoundError
        If the directory holds no such file, once the traces are asked for.
    ValueError
        If there is no text, once the traces are asked for.
    """

    def read() -> list[Trace]:
        tokenizer, length = setting.tokenizer, setting.length
        if setting.data is not None:
            path = _text_file(setting.data)
            source = read_text(path, split=setting.split, tokenizer=tokenizer, trace_length=length, schedule=schedule)
            return source.traces[: setting.num_examples]
        part = WIKITEXT_SPLITS[setting.split]
        wikitext = Source("text.txt", "Salesforce/wikitext", ("text",), "wikitext-103-raw-v1", part)
        text = "\n\n".join(record["text"] for record in wikitext.read(None))
        traces = cut_text(text, "wikitext", tokenizer=tokenizer, trace_length=length, schedule=schedule)
        return traces[: setting.num_examples]

    return LazySource("text", setting.split, read)


def _text_file(data: Path) -> Path:
    """Return the file of plain text in a directory."""
    files = sorted(data.glob("*.txt"))
    if data / "text.txt" in files:
        return data / "text.txt"
    if len(files) != 1:
        found = f"{', '.join(file.name for file in files)} are there" if files else "no .txt file is there"
        raise FileNotFoundError(f"the data lack {data / 'text.txt'}: {found}")
    return files[0]
