"""Traces that users bring: text files, JSON lines, datasets and registered functions.

A dataset has splits of its own and a function is told the split; a file gives every split the same traces, so keep a
second file for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvenv.files import parse_line
from kvenv.traces.source import Encoder, Trace, TraceSource

FORMS = ("input_ids", "text", "prompt", "messages")  # what a record holds: exactly one of these


class ListSource(TraceSource):
    """Traces that are all there from the start."""

    def __init__(self, name: str, split: str, traces: list[Trace]) -> None:
        super().__init__(name, split)
        self.traces = traces
        self.size = len(traces)

    @property
    def max_prompt_length(self) -> int:
        """The longest prompt of the split, in tokens."""
        return max(trace.prompt_length for trace in self.traces)

    def make(self, trace_id: int) -> Trace:
        return self.traces[trace_id]


class FunctionSource(TraceSource):
    """Endless traces from a function given to :func:`kvenv.register_traces`."""

    size = None

    def __init__(self, name: str, split: str, function: Callable[..., Trace], **arguments: Any) -> None:
        super().__init__(name, split)
        self.function = function
        self.arguments = arguments

    @property
    def max_prompt_length(self) -> int:
        """The longest prompt among the first 32 traces, in tokens."""
        return max(self[trace_id].prompt_length for trace_id in range(32))

    def make(self, trace_id: int) -> Trace:
        trace = self.function(trace_id, split=self.split, **self.arguments)
        if not isinstance(trace, Trace):
            raise ValueError(
                f"traces {self.name!r} returned {type(trace).__name__} for trace {trace_id}: return a kvenv.Trace"
            )
        return trace


def _read(path: Path) -> str:
    """Return the text of a file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"traces {str(path)!r}: not UTF-8 ({error.reason} at byte {error.start})") from error


def _prompt(length: int, schedule: str) -> int:
    # Text without a prompt: under "prefill" its first half is one.
    return length // 2 if schedule == "prefill" else 0


def read_text(path: Path, *, split: str, tokenizer: Any, trace_length: int, schedule: str) -> ListSource:
    """Cut a text file into consecutive traces of ``trace_length`` tokens, each with BOS in front.

    A shorter rest is dropped, unless it is all there is.

    Raises
    ------
    ValueError
        If the file is empty.
    """
    traces = cut_text(_read(path), path.name, tokenizer=tokenizer, trace_length=trace_length, schedule=schedule)
    if not traces:
        raise ValueError(f"traces {str(path)!r}: the file holds no text")
    return ListSource(str(path), split, traces)


def cut_text(text: str, name: str, *, tokenizer: Any, trace_length: int, schedule: str) -> list[Trace]:
    """Cut a text as :func:`read_text` does; no trace if it is empty, and names ``name/0``, ``name/1``, ..."""
    encoder = Encoder(tokenizer)
    ids = encoder.part(text)
    size = trace_length - len(encoder.start)
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    if len(pieces) > 1 and len(pieces[-1]) < size:
        pieces.pop()
    traces = []
    for number, piece in enumerate(pieces):
        tokens = np.array(encoder.start + piece, dtype=np.int64)
        traces.append(Trace(tokens, _prompt(len(tokens), schedule), (), f"{name}/{number}"))
    return traces


def read_jsonl(path: Path, *, split: str, tokenizer: Any, trace_length: int, schedule: str) -> ListSource:
    """Read one trace per line: ``input_ids``, ``text``, ``messages``, or ``prompt`` and ``response`` (and ``answer``).

    Traces are cut to ``trace_length`` tokens; blank lines are skipped.

    Raises
    ------
    ValueError
        If a line is malformed; the message names file and line.
    """
    encoder = Encoder(tokenizer)
    traces = []
    # Not splitlines: a JSON string may hold other line separators, such as U+2028.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        record = parse_line(line, place)
        traces.append(trace_from_record(record, encoder, trace_length, schedule, place))
    if not traces:
        raise ValueError(f"traces {str(path)!r}: the file holds no trace")
    return ListSource(str(path), split, traces)


def read_dataset(name: str, *, split: str, tokenizer: Any, trace_length: int, schedule: str) -> ListSource:
    """Read the records of a Hugging Face dataset's split as :func:`read_jsonl` reads lines.

    An ``answer`` that doesn't occur in its response is left unmarked: there the field may mean something else.

    Raises
    ------
    ValueError
        If the optional package is missing, the split cannot be loaded, or a record is malformed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"traces 'hf:{name}' need the optional package datasets: pip install 'kvenv[datasets]'"
        ) from error
    try:
        records: Iterable[Any] = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises many kinds; all of them mean that this name or split is not there
        raise ValueError(f"traces 'hf:{name}' split {split!r} cannot be loaded: {error}") from error
    encoder = Encoder(tokenizer)
    traces = [
        trace_from_record(
            {
                key: value
                for key, value in record.items()
                if key in (*FORMS, "response", "answer") and value is not None
            },
            encoder,
            trace_length,
            schedule,
            f"hf:{name}/{split}:{number}",
            own=False,
        )
        for number, record in enumerate(records, start=1)
    ]
    if not traces:
        raise ValueError(f"traces 'hf:{name}' split {split!r} hold no record")
    return ListSource(f"hf:{name}", split, traces)


def trace_from_record(
    record: Any, encoder: Encoder, trace_length: int, schedule: str, place: str, *, own: bool = True
) -> Trace:
    """Make a trace of one record.

    Parameters
    ----------
    record : dict
        Exactly one of ``input_ids`` (list of int), ``text`` (str), ``prompt`` with ``response`` (both str), or
        ``messages`` (objects with ``role`` and ``content``, put into the tokenizer's chat template; the last one is the
        response; a ``prompt`` without ``response`` beside them is passed over). With a response, ``answer`` (str) is
        marked where it occurs last in it.
    encoder : Encoder
        Encodes the text.
    trace_length : int
        Longer traces are cut to this many tokens.
    schedule : str
        Under ``"prefill"`` a record without a prompt gets its first half as one.
    place : str
        File and line, as errors name them; also the name of the trace.
    own : bool
        Whether the record was written for this: then an ``answer`` that doesn't occur in the response is an error, else
        it is left unmarked.

    Raises
    ------
    ValueError
        If the record is malformed.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{place}: {type(record).__name__} where an object was expected")
    forms = [form for form in FORMS if form in record]
    if "messages" in forms and "prompt" in forms and "response" not in record:
        forms.remove("prompt")  # data sets of conversations repeat their first message there
    if len(forms) != 1:
        found = " and ".join(forms) or "none"
        raise ValueError(
            f"{place}: {found} given: give exactly one of input_ids, text, prompt (with response), messages"
        )
    if forms == ["input_ids"]:
        ids = record["input_ids"]
        if not isinstance(ids, list) or not ids or any(type(i) is not int or not 0 <= i < 2**63 for i in ids):
            raise ValueError(f"{place}: input_ids must be a list of token ids (integers >= 0)")
        trace = Trace(np.array(ids, dtype=np.int64), _prompt(min(len(ids), trace_length), schedule), (), place)
    elif forms == ["text"]:
        ids = encoder.text(_string(record, "text", place))
        trace = Trace(np.array(ids, dtype=np.int64), _prompt(min(len(ids), trace_length), schedule), (), place)
    elif forms == ["messages"]:
        prompt, response = _conversation(record["messages"], encoder, place)
        trace = _with_response(encoder.part(prompt), response, _answer(record, response, own, place), encoder, place)
    else:
        prompt, response = _string(record, "prompt", place), _string(record, "response", place)
        trace = _with_response(encoder.text(prompt), response, _answer(record, response, own, place), encoder, place)
    if trace.prompt_length >= trace_length:
        raise ValueError(
            f"{place}: the prompt has {trace.prompt_length} tokens: choose trace_length above that, not {trace_length}"
        )
    answers = tuple(span for span in trace.answers if span[1] <= trace_length)
    return replace(trace, tokens=trace.tokens[:trace_length], answers=answers)


def _string(record: dict[str, Any], key: str, place: str) -> str:
    if not _is_text(record.get(key)) or not record[key]:
        raise ValueError(f"{place}: {key} must be a string that is not empty")
    return record[key]


def _is_text(value: Any) -> bool:
    """Return whether a JSON value is text: a string of JSON can hold half a surrogate pair, which is none."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _conversation(messages: Any, encoder: Encoder, place: str) -> tuple[str, str]:
    """Return the text of a conversation before its last message, and from there."""
    if (
        not isinstance(messages, list)
        or len(messages) < 2
        or not all(
            isinstance(one, dict) and _is_text(one.get("content")) and _is_text(one.get("role")) for one in messages
        )
    ):
        raise ValueError(f"{place}: messages must be a list of two or more objects with role and content, both text")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{place}: the last message must be the assistant's, not the {messages[-1]['role']}'s")
    try:
        prompt, whole = encoder.chat(messages[:-1], answered=False), encoder.chat(messages, answered=True)
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"{place}: messages don't fit the chat template: {error}") from error
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :]
    # Some templates begin an answer otherwise than they tell one, and leave its thoughts out: it is told by itself.
    content = messages[-1]["content"]
    begun = next((size for size in range(len(content), 0, -1) if prompt.endswith(content[:size])), 0)
    return prompt, content[begun:] + encoder.end


def _answer(record: dict[str, Any], response: str, own: bool, place: str) -> str:
    """Return the answer that is to be marked in a response; empty if none is."""
    if not own:
        answer = record.get("answer")
        return answer if isinstance(answer, str) and answer in response else ""
    if "answer" not in record:
        return ""
    answer = _string(record, "answer", place)
    if answer not in response:
        raise ValueError(f"{place}: answer {answer!r} does not occur in the response")
    return answer


def _with_response(ids: list[int], response: str, answer: str, encoder: Encoder, place: str) -> Trace:
    """Return the trace of a prompt and what follows it."""
    prompt_length = len(ids)
    answers: tuple[tuple[int, int], ...] = ()
    if answer:
        begin = response.rfind(answer)
        # Encoded in three parts, so that the span is exact; a space before the answer belongs to its first token.
        begin -= begin > 0 and response[begin - 1] == " "
        end = response.rfind(answer) + len(answer)
        parts = [encoder.part(part) for part in (response[:begin], response[begin:end], response[end:])]
        start = prompt_length + len(parts[0])
        answers = ((start, start + len(parts[1])),)
        ids = ids + parts[0] + parts[1] + parts[2]
    else:
        ids = ids + encoder.part(response)
    return Trace(np.array(ids, dtype=np.int64), prompt_length, answers, place)
