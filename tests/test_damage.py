"""Files that were cut anywhere, had a bit flipped anywhere, or are something else: refused by name, or never missed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import agents
from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.learner import State
from experiments.jobs import read_times
from experiments.report import load
from experiments.results import ANSWERS, CONFIG, RESULTS, ROWS, Results, read_rows, writing
from experiments.runs import METRICS, Run, read_config, read_metrics
from kvenv.files import append_line, read_json, read_lines, sealed, unsealed
from kvenv.store import StoreWriter, TraceStore
from tests.killing import RECORDING, TERMS, Counter, answers, policy, recorded
from tests.test_report import make

FOREIGN = (
    *(b"", b"\0" * 64, b"\xff" * 64, b"PK\3\4", b"{", b"[]", b"{}", b"7", b"null", b'"x"'),
    *(b"[" * 100_000, b"9" * 5000),
)


def cut(content: bytes) -> Iterator[bytes]:
    """Yield all beginnings of a file, or some hundreds of a large one's."""
    for length in range(0, len(content), 1 + len(content) // 800):
        yield content[:length]


def flipped(content: bytes) -> Iterator[bytes]:
    """Yield a file with a bit flipped, of each byte in turn another one; of a large one in some hundreds of bytes."""
    for at in range(0, len(content), 1 + len(content) // 800):
        yield content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]


def damaged(path: Path) -> Iterator[bytes]:
    """Put a file's damaged versions into its place, one after another, and at last what was there."""
    content = path.read_bytes()
    for version in (*cut(content), *flipped(content), *FOREIGN):
        path.write_bytes(version)
        yield version
    path.write_bytes(content)


def refused(read: Callable[[], Any], path: Path) -> bool:
    """Return whether a ValueError refuses to read, which names the file; anything else but success is a bug."""
    try:
        read()
    except ValueError as error:
        said = error
    else:
        return False
    assert type(said) is ValueError
    assert path.name in str(said)
    return True


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_checkpoint_that_is_not_what_was_written_is_refused(name: str, tmp_path: Path) -> None:
    written = State({"weights": torch.arange(4.0)}, {"done": 7, "of": [0.1, None], "seconds": 1e-3})
    save_checkpoint(tmp_path, written, 7)
    path = tmp_path / "00000007" / name
    for version in damaged(path):
        if not refused(lambda: load_checkpoint(tmp_path), path):
            found = load_checkpoint(tmp_path)
            assert found.values == written.values, version
            assert torch.equal(found.tensors["weights"], written.tensors["weights"]), version
    assert load_checkpoint(tmp_path).values == written.values


def test_weights_that_are_not_those_of_the_description_are_refused(tmp_path: Path) -> None:
    policy(3).save_pretrained(tmp_path)
    path, expected = tmp_path / "policy.safetensors", policy(3).scorer.state_dict()
    for version in damaged(path):
        if not refused(lambda: agents.make(tmp_path), path):
            found = agents.make(tmp_path).scorer.state_dict()
            assert all(torch.equal(found[name], expected[name]) for name in expected), version
    policy(4).save_pretrained(tmp_path / "other")
    path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    with pytest.raises(ValueError, match=r"policy\.safetensors is damaged or of another policy: fingerprint \w+"):
        agents.make(tmp_path)


def test_a_damaged_description_ends_in_no_other_error(tmp_path: Path) -> None:
    policy(3).save_pretrained(tmp_path)
    path = tmp_path / "policy.json"
    count = sum(refused(lambda: agents.make(tmp_path), tmp_path / "policy.") for _ in damaged(path))
    assert count > path.stat().st_size  # all that was cut, and some of what was flipped
    description = json.loads(path.read_text())
    del description["fingerprint"]
    path.write_text(json.dumps(description))
    assert agents.make(tmp_path).training == {"updates_done": 3}, "policies of before are loaded"


def test_a_store_that_is_not_what_was_recorded_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, RECORDING)
    writer.add([recorded(1)])
    expected = TraceStore(tmp_path)

    def read() -> None:
        store = TraceStore(tmp_path)
        for shard in store.shards:
            store.verify(shard)

    for _ in damaged(index := tmp_path / "index.json"):
        if not refused(read, index):
            assert (TraceStore(tmp_path).recording, TraceStore(tmp_path).shards) == (RECORDING, expected.shards)
    for version in damaged(shard := tmp_path / "shard-00000.safetensors"):
        assert refused(read, shard), version


def test_stores_of_before_digests_are_read(tmp_path: Path) -> None:
    StoreWriter(tmp_path, RECORDING).add([recorded(1)])
    index = json.loads((tmp_path / "index.json").read_text())
    del index["seal"], index["shards"][0]["sha256"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    store = TraceStore(tmp_path)
    store.verify(store.shards[0])
    assert len(store) == 1


def test_a_runs_configuration_that_was_changed_is_refused(tmp_path: Path) -> None:
    arguments = {"learner": {"updates": 4, "seed": 0, "learning_rate": 0.1}}
    config = {"learner": "counter", "arguments": arguments, "made_from": {}, "commit": None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sealed(config), indent=2))
    for version in damaged(path):
        if not refused(lambda: read_config(tmp_path), path):
            # A flip may have made an unknown word of seal, which says nothing.
            found = read_config(tmp_path)
            assert {name: found.get(name) for name in config} == config, version
    for other in ({"arguments": {}}, {"arguments": {"learner": 3}}, {"made_from": []}):
        path.write_text(json.dumps(config | other))
        append_line(tmp_path / METRICS, {"step": 0})
        assert refused(lambda: load([tmp_path]), path)


def test_metrics_are_read_up_to_a_torn_end_and_refused_where_they_are_damaged(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    path = run / METRICS
    lines, content = read_metrics(run), path.read_bytes()
    for start in cut(content):
        path.write_bytes(start)
        assert read_metrics(run) == lines[: start.count(b"\n")]
    for version in flipped(content):
        path.write_bytes(version)
        refused(lambda: read_metrics(run), path)
    path.write_bytes(content.replace(b"1", b"x", 1))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:\d is not a JSON line"):
        load([run])
    for line in ("7", "[]", "null", "{}", '{"step": 1.5}', '{"step": 1, "loss": "low"}', '{"step": true}'):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl:1 is not a step's metrics"):
            load([run])


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    """An evaluation that was killed: one example in its files, one in its journal."""
    with writing(tmp_path, TERMS) as results:
        results.add(answers(0))
    Results(tmp_path, TERMS).add(answers(1))
    return tmp_path


@pytest.mark.parametrize("name", [CONFIG, RESULTS, ANSWERS, ROWS])
def test_damaged_results_are_refused_by_name_or_have_no_half_a_row(name: str, evaluated: Path) -> None:
    whole = Results(evaluated, TERMS).rows
    assert len(whole) == 4
    for _ in damaged(evaluated / name):
        refused(lambda: Results(evaluated, TERMS), evaluated)
    assert Results(evaluated, TERMS).rows == whole


def test_a_torn_journal_costs_the_batch_that_was_torn_only(evaluated: Path) -> None:
    content = (evaluated / ROWS).read_bytes()
    for start in [*cut(content)][::9]:
        (evaluated / ROWS).write_bytes(start)
        assert len(Results(evaluated, TERMS).rows) == 2
        Results(evaluated, TERMS).add(answers(1))
        assert (evaluated / ROWS).read_bytes() == content
    (evaluated / ROWS).write_bytes(b"{}\n" + content)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: lacks rows, answers"):
        Results(evaluated, TERMS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("trace", "0"), ("trace", True), ("policy", []), ("score", "1"), ("lm_loss", [1]), ("truncated", 1)],
)
def test_a_row_of_other_types_is_refused(name: str, value: object, evaluated: Path) -> None:
    rows = json.loads((evaluated / RESULTS).read_text())
    (evaluated / RESULTS).write_text(json.dumps([rows[0], rows[1] | {name: value}]))
    with pytest.raises(ValueError, match=rf"results\.json is not a results\.json: {name} "):
        read_rows(evaluated / RESULTS)


def test_event_files_that_are_cut_flipped_or_foreign_stop_no_run(tmp_path: Path) -> None:
    learner, run = Counter(), Run.create(tmp_path, "counter", TermsOfNothing())
    with run.writing(0):
        run.log(1, learner.update())
        run.save(learner)
    (events,) = tmp_path.glob("events.out.tfevents.*")
    content = events.read_bytes()
    events.write_bytes(content[: len(content) // 2])
    for name, foreign in (("x", b"foreign"), ("²", b""), ("99999999999.torn", content[:-3]), ("1.flipped", b"\xff")):
        (tmp_path / f"events.out.tfevents.{name}").write_bytes(foreign)
    run.restore(learner)
    with run.writing(learner.done):
        run.log(2, learner.update())
        run.save(learner)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    newest = max(tmp_path.glob("events*"), key=lambda path: path.stat().st_mtime_ns)
    curves = EventAccumulator(str(newest)).Reload()
    assert [event.step for event in curves.Scalars("loss/count")] == [2]


class TermsOfNothing:
    """Stands for arguments."""

    __dataclass_fields__: dict[str, Any] = {}


def test_lines_are_appended_whole_and_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    assert read_lines(path) == []
    records = [{"text": "zwölf\u2028\n"}, [1, None], 0.1]
    for record in records:
        append_line(path, record)
    assert read_lines(path) == records
    content = path.read_bytes()
    for start in cut(content):
        path.write_bytes(start)
        assert read_lines(path) == records[: start.count(b"\n")]
        append_line(path, "next")
        assert read_lines(path) == [*records[: start.count(b"\n")], "next"]
    path.write_bytes(content.replace(b"null", b"nul"))
    with pytest.raises(ValueError, match=r"lines\.jsonl:2 is not a JSON line: "):
        read_lines(path)


def test_a_seal_is_of_what_is_said_not_of_how() -> None:
    content = {"a": [1, 2.5, 1e-300, None], "b": {"x": "ü", "y": (1, 2)}}
    again = json.loads(json.dumps(sealed(content), indent=3, sort_keys=True))
    assert unsealed(again, Path("x")) == {"a": [1, 2.5, 1e-300, None], "b": {"x": "ü", "y": [1, 2]}}
    assert unsealed({"a": 1}, Path("x")) == {"a": 1}
    with pytest.raises(ValueError, match=r"x\.json is damaged, or was changed by hand"):
        unsealed(again | {"a": [1, 2.5, 1e-300, 0]}, Path("x.json"))


@pytest.mark.parametrize("content", [b"[", b"\xff", b"[" * 100_000, b"9" * 5000, b""])
def test_what_is_not_json_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    for read in (lambda: read_json(path, "a thing"), lambda: read_times(path)):
        with pytest.raises(ValueError, match=r"some\.json is not "):
            read()
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        read_json(tmp_path / "nothing.json", "a thing")
