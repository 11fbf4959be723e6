"""Recorded utilities against materialised attention; a store that is damaged, foreign or of another LLM is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load, save

import kvenv
from kvenv.identity import fingerprint
from kvenv.models import LoadedModel
from kvenv.recording import Recording, cuts, record, sample
from kvenv.store import StoreWriter, TraceStore
from tests.models import random_model
from tests.policies import kvenv_model, random_traces
from tests.reference import masked_run

INTERVAL = 6
LENGTHS = (30, 23, 8)


def recording(**changes: object) -> Recording:
    """Return the description of the small store."""
    loaded = LoadedModel("random", kvenv_model(), None)
    made = Recording.of(loaded, traces="random", split="train", trace_length=30, interval=INTERVAL)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of three traces of different lengths in two shards."""
    writer, traces = StoreWriter(tmp_path / "store", recording()), random_traces(list(LENGTHS))
    for shard in (traces[:2], traces[2:]):
        writer.add(record(kvenv_model(), shard, INTERVAL))
    return tmp_path / "store"


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("interval", [1, 4, 7])
def test_utilities_are_those_of_materialised_attention(interval: int, reduce: Literal["sum", "max"]) -> None:
    model, traces = kvenv_model(), random_traces([30, 21])
    for trace, recorded in zip(traces, record(model, traces, interval, reduce), strict=True):
        assert list(recorded.cuts) == [n for n in range(1, len(trace.tokens) - 1) if n % interval == 0]
        run = masked_run(model, trace.tokens)
        for cut in recorded.cuts:
            utility = recorded.utility_at(cut)
            for layer, attention in enumerate(run.attention):
                by_head = torch.as_tensor(attention).unflatten(0, (2, -1))[:, :, cut:, :cut]
                if reduce == "sum":
                    expected = by_head.amax(dim=1).sum(dim=1)
                else:
                    windows = by_head.mean(dim=1).split(interval, dim=1)
                    expected = torch.stack([window.mean(dim=1) for window in windows]).amax(dim=0)
                torch.testing.assert_close(utility[layer], expected.float(), rtol=0, atol=1e-5)


def test_pairs_are_those_of_the_models_own_cache() -> None:
    model, traces = kvenv_model(), random_traces([30, 21])
    for trace, recorded in zip(traces, record(model, traces, 5), strict=True):
        with torch.no_grad():
            cache = model(torch.as_tensor(trace.tokens)[None, :-1], use_cache=True).past_key_values
        for layer, pairs in enumerate(cache.layers):
            torch.testing.assert_close(recorded.keys[layer], pairs.keys[0])
            torch.testing.assert_close(recorded.values[layer], pairs.values[0])


def test_a_store_gives_back_what_was_recorded(store: Path) -> None:
    traces = random_traces(list(LENGTHS))
    opened = TraceStore(store, model=kvenv_model())
    assert len(opened) == 3
    assert opened.recording == recording()
    for there, expected in zip(opened, record(kvenv_model(), traces, INTERVAL), strict=True):
        assert there.name == expected.name
        for name in ("keys", "values", "utility", "tokens"):
            torch.testing.assert_close(getattr(there, name), getattr(expected, name))


def test_the_announced_size_is_the_size_on_disk(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, recording())
    writer.add(record(kvenv_model(), random_traces([30, 30]), INTERVAL))
    tensors = load((tmp_path / "shard-00000.safetensors").read_bytes())
    assert sum(x.nbytes for x in tensors.values()) == 2 * recording().trace_nbytes


def test_half_precision_is_half_the_pairs(tmp_path: Path) -> None:
    StoreWriter(tmp_path, recording(dtype="float16")).add(record(kvenv_model(), random_traces([30]), INTERVAL))
    trace, exact = TraceStore(tmp_path)[0], record(kvenv_model(), random_traces([30]), INTERVAL)[0]
    assert trace.keys.dtype == trace.values.dtype == torch.float16
    torch.testing.assert_close(trace.keys.double(), exact.keys, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(trace.utility, exact.utility)


def test_a_store_is_mapped_not_read(store: Path) -> None:
    content, trace = (store / "shard-00000.safetensors").read_bytes(), TraceStore(store)[0]
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    offsets = {name: header[f"0.{name}"]["data_offsets"][0] for name in ("keys", "values", "utility")}
    addresses = {name: getattr(trace, name).data_ptr() for name in offsets}
    # As far apart in memory as in the file: they lie in one mapping of it.
    assert {addresses[name] - offsets[name] for name in offsets} == {addresses["keys"] - offsets["keys"]}


def test_recording_goes_on_after_the_last_whole_shard(store: Path) -> None:
    (store / "shard-00002.safetensors").write_bytes(b"written, but the index was not")
    assert len(TraceStore(store)) == 3
    writer = StoreWriter(store, recording())
    assert writer.recorded == 3
    writer.add(record(kvenv_model(), random_traces([25]), INTERVAL))
    assert [len(trace.tokens) for trace in TraceStore(store)] == [*LENGTHS, 25]


@pytest.mark.parametrize("change", [{"traces": "others"}, {"interval": 3}, {"fingerprint": "0"}, {"reduce": "sum"}])
def test_another_recording_is_not_continued(store: Path, change: dict[str, object]) -> None:
    name = next(iter(change))
    with pytest.raises(ValueError, match=rf"index\.json was recorded with {name}"):
        StoreWriter(store, recording(**change))


def test_the_fingerprint_is_of_the_weights() -> None:
    assert fingerprint(random_model()) == fingerprint(kvenv_model())
    assert fingerprint(random_model(seed=1)) != fingerprint(random_model())
    assert fingerprint(random_model("llama")) != fingerprint(random_model("mistral"))


def test_another_model_is_refused(store: Path) -> None:
    with pytest.raises(ValueError, match="recorded from another model"):
        TraceStore(store, model=random_model(seed=1))


def edit_index(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Return what edits a store's index."""

    def damage(store: Path) -> None:
        index = json.loads((store / "index.json").read_text())
        change(index)
        (store / "index.json").write_text(json.dumps(index))

    return damage


def edit_shard(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Return what edits a store's first shard."""

    def damage(store: Path) -> None:
        path = store / "shard-00000.safetensors"
        tensors = load(path.read_bytes())
        change(tensors)
        path.write_bytes(save(tensors))

    return damage


def truncate(store: Path) -> None:
    """Cut a shard in half."""
    path = store / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "truncated shard": (truncate, r"shard-00000\.safetensors is damaged"),
    "foreign shard": (
        lambda store: (store / "shard-00001.safetensors").write_bytes(b"PK not ours"),
        r"shard-00001\.safetensors is damaged",
    ),
    "tensor missing": (edit_shard(lambda x: x.pop("1.keys")), r"shard-00000\.safetensors is damaged"),
    "other shape": (
        edit_shard(lambda x: x.update({"0.values": x["0.values"][:, :1].contiguous()})),
        r"shard-00000\.safetensors is damaged.*index promises",
    ),
    "other type": (edit_shard(lambda x: x.update({"0.keys": x["0.keys"].float()})), "index promises"),
    "no index": (lambda store: (store / "index.json").write_text("[1, 2"), r"index\.json is not the index"),
    "list": (lambda store: (store / "index.json").write_text("[1, 2]"), r"index\.json is not the index"),
    "other format": (edit_index(lambda x: x.update(format="theirs")), "format is 'theirs'"),
    "other field": (edit_index(lambda x: x.update(interval="6")), "interval '6' must be of type int"),
    "no frequency": (edit_index(lambda x: x.update(inv_freq=[None])), r"inv_freq \[None\] must be of type list"),
    "impossible": (edit_index(lambda x: x.update(interval=0)), "interval 0"),
    "other utility": (edit_index(lambda x: x.update(reduce="median")), "median"),
    "other dtype": (edit_index(lambda x: x.update(dtype="int4")), "int4"),
    "shards": (edit_index(lambda x: x.update(shards=[7])), r"index\.json is not the index"),
    "traversal": (
        edit_index(lambda x: x["shards"][0].update(file="../shard-00000.safetensors")),
        r"index\.json names the shard '\.\./shard",
    ),
    "absolute": (
        edit_index(lambda x: x["shards"][0].update(file="/etc/shard-00000.safetensors")),
        r"names the shard '/etc/shard",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_stores_are_refused_by_name(store: Path, damage: str) -> None:
    break_it, message = DAMAGES[damage]
    break_it(store)
    with pytest.raises(ValueError, match=message):
        TraceStore(store)


def test_what_is_missing_is_said(store: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no trace store"):
        TraceStore(tmp_path / "nowhere")
    (store / "shard-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists shard-00001\.safetensors, which is missing"):
        TraceStore(store)


def test_cuts_leave_a_future_query() -> None:
    # Of T tokens T - 1 are fed: a cut of T - 1 pairs would have no query after it.
    assert list(cuts(14, 6)) == [6, 12]
    assert list(cuts(13, 6)) == [6]
    assert list(cuts(7, 6)) == []
    with pytest.raises(ValueError, match="needs at least 8"):
        record(kvenv_model(), random_traces([7]), INTERVAL)
    with pytest.raises(ValueError, match="interval 0"):
        record(kvenv_model(), random_traces([7]), 0)
    trace = record(kvenv_model(), random_traces([14]), INTERVAL)[0]
    assert (trace.utility_at(12) > 0).any(dim=-1).all()
    with pytest.raises(ValueError, match="multiple of 6 from 6 to 12"):
        trace.utility_at(7)


def test_the_sample_is_of_every_family() -> None:
    assert [trace.name.split("/")[0] for trace in sample()] == ["recall", "tracking", "dialogue", "reasoning"]
    assert sample() is sample()
    assert kvenv.TraceStore is TraceStore
