"""Files of traces and of records hold anything: they are read, or refused by name and line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from kvenv.models import load_model
from kvenv.tasks.records import check_fields, read_file
from kvenv.traces import SCHEDULES, load_traces
from tests.fuzz.counted import fuzz
from tests.fuzz.values import JSON, changed_bytes, changed_json

RECORDS: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 8, 9]},
    {"text": "the code of the gate is seven"},
    {"prompt": "what is the code ?", "response": "the code is seven .", "answer": "seven"},
    {"messages": [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": "seven"}]},
]
"""One of each kind."""

LINES = st.lists(
    st.one_of(
        st.sampled_from(RECORDS).flatmap(changed_json).map(json.dumps),
        st.sampled_from(RECORDS).map(json.dumps),
        JSON.map(json.dumps),
        st.sampled_from(["", " ", "{", "[" * 5000, '{"input_ids": [' + "9" * 5000 + "]}", "NaN", "\u2028"]),
    ),
    max_size=4,
)
TEXTS = LINES.map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")) | LINES.flatmap(
    lambda lines: changed_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that all examples share."""
    return tmp_path_factory.mktemp("data")


def refused_by_name(path: Path, read: Callable[[], Any], lines: bool) -> None:
    """Read a file; a refusal names it, and where there are lines the line, unless it is about the whole."""
    try:
        read()
    except ValueError as refusal:
        told = str(refusal)
        if "need a tokenizer" in told:
            return
        assert str(path) in told
        assert not lines or re.search(rf"{re.escape(str(path))}:\d+|holds no|not UTF-8", told), told


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@fuzz(
    50,
    data=TEXTS,
    trace_length=st.sampled_from([2, 3, 8, 64]),
    schedule=st.sampled_from(SCHEDULES),
    tokenizer=st.booleans(),
)
def test_traces_are_read_or_refused(
    directory: Path, suffix: str, data: bytes, trace_length: int, schedule: str, tokenizer: bool
) -> None:
    path = directory / f"traces{suffix}"
    path.write_bytes(data)

    def read() -> None:
        source = load_traces(
            str(path),
            tokenizer=load_model("tiny").tokenizer if tokenizer else None,
            trace_length=trace_length,
            schedule=schedule,
        )
        for number in range(len(source)):
            assert 0 < len(source[number].tokens) <= trace_length
        assert source.max_prompt_length <= trace_length

    refused_by_name(path, read, lines=suffix == ".jsonl")


@fuzz(50, data=TEXTS)
def test_records_are_read_or_refused(directory: Path, data: bytes) -> None:
    path = directory / "records"
    path.write_bytes(data)

    def read() -> None:
        for number, record in enumerate(read_file(path), start=1):
            check_fields(record, ("text",), f"{path}:{number}")

    refused_by_name(path, read, lines=True)
