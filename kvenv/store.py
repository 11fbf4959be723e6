"""Trace stores: recorded traces in a directory of safetensors shards and ``index.json``, which lists them.

A shard is written whole, then the index that names it: what a killed recording leaves is a smaller store. Shards are
read memory-mapped, so that opening a store doesn't read them: whether their bits are those that were written,
:meth:`TraceStore.verify` says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints, overload

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from kvenv.checks import fits
from kvenv.files import digest, read_json, sealed, unsealed, write_atomic
from kvenv.golden import Reduce
from kvenv.identity import architecture, fingerprint
from kvenv.recording import DTYPES, TENSORS, RecordedTrace, Recording, cuts, packed
from kvenv.rotary import Rotary

INDEX = "index.json"
FORMAT = "kvenv trace store 1"

_SHARD = re.compile(r"shard-\d{5,}\.safetensors")


@dataclass(frozen=True)
class Shard:
    """A file of a store.

    Attributes
    ----------
    file : str
        Its name.
    names : list of str
        The traces in it, in order.
    sha256 : str or None
        Of the file; None in stores of before digests.
    """

    file: str
    names: list[str]
    sha256: str | None = None


class TraceStore(Sequence[RecordedTrace]):
    """The recorded traces of a directory, memory-mapped: only what is looked at is read.

    Parameters
    ----------
    directory : path-like
        Where ``python -m experiments.record`` wrote.
    model : PreTrainedModel, optional
        The LLM that it must be a recording of.

    Attributes
    ----------
    recording : Recording
        What it holds.
    identity : ModelIdentity
        Which LLM was recorded; with ``model``, all of its architecture.
    shards : list of Shard
        Its files.

    Raises
    ------
    FileNotFoundError
        If there is no index, or a shard is missing.
    ValueError
        If a file is damaged or foreign, or the LLM is another one; the message names the file.
    """

    def __init__(self, directory: str | os.PathLike[str], model: PreTrainedModel | None = None) -> None:
        self.directory = Path(directory)
        self.recording, self.shards = read_index(self.directory)
        self.identity = self.recording.identity
        if model is not None:
            self._check_model(model)
            self.identity = replace(self.identity, architecture=architecture(model))
        self._traces = [trace for shard in self.shards for trace in self._open(shard)]

    def __len__(self) -> int:
        return len(self._traces)

    @overload
    def __getitem__(self, index: int) -> RecordedTrace: ...

    @overload
    def __getitem__(self, index: slice) -> list[RecordedTrace]: ...

    def __getitem__(self, index: int | slice) -> RecordedTrace | list[RecordedTrace]:
        return self._traces[index]

    def verify(self, shard: Shard) -> None:
        """Read all of a shard and compare its digest, about a second per gigabyte; `kvenv train kvp` begins with that.

        Raises
        ------
        ValueError
            If it isn't what was written.
        """
        path = self.directory / shard.file
        if shard.sha256 is not None and shard.sha256 != digest(path):
            raise ValueError(f"{path} is damaged: its digest is not the one in {INDEX}; record the store anew")

    def _check_model(self, model: PreTrainedModel) -> None:
        """Refuse an LLM that wasn't recorded."""
        name, recorded = self.recording.model, self.identity
        difference = recorded.architecture.difference(architecture(model))
        if not difference and recorded.fingerprint != fingerprint(model):
            difference = f"fingerprint {self.recording.fingerprint[:12]}..., not {fingerprint(model)[:12]}..."
        if difference:
            raise ValueError(
                f"{self.directory} was recorded from another model than this one, {name!r} with {difference}: record "
                "it anew"
            )

    def _open(self, shard: Shard) -> list[RecordedTrace]:
        """Map the traces of a shard."""
        path = self.directory / shard.file
        if not path.is_file():
            raise FileNotFoundError(f"{self.directory / INDEX} lists {path.name}, which is missing")
        try:
            with safe_open(path, framework="pt") as file:
                traces, rotary = [], Rotary(torch.tensor(self.recording.inv_freq), self.recording.rotary_scaling)
                for index, name in enumerate(shard.names):
                    tensors = {tensor: file.get_tensor(f"{index}.{tensor}") for tensor in TENSORS}
                    trace = RecordedTrace(name, self.recording.interval, **tensors, rotary=rotary)
                    self._check(trace)
                    traces.append(trace)
                return traces
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is damaged or not a shard of this store: {error}") from error

    def _check(self, trace: RecordedTrace) -> None:
        """Refuse tensors of shapes or types that the index doesn't promise."""
        made = self.recording
        if trace.tokens.ndim != 1 or not cuts(len(trace.tokens), made.interval):
            raise ValueError(f"tokens of trace {trace.name!r} have shape {tuple(trace.tokens.shape)}")
        heads, length = (made.layers, made.kv_heads), len(trace.tokens)
        pairs = (*heads, length - 1, made.head_dim)
        expected = {
            "keys": (pairs, DTYPES[made.dtype]),
            "values": (pairs, DTYPES[made.dtype]),
            "utility": ((*heads, packed(made.interval, len(trace.cuts))), torch.float32),
            "tokens": ((length,), torch.int64),
        }
        for name, promised in expected.items():
            tensor = getattr(trace, name)
            found = (tuple(tensor.shape), tensor.dtype)
            if found != promised:
                raise ValueError(f"{name} of trace {trace.name!r} are {found}, where the index promises {promised}")


class StoreWriter:
    """Adds shards to a store, or goes on with one.

    Parameters
    ----------
    directory : path-like
        New, or a store of the same recording.
    recording : Recording
        What is recorded.

    Attributes
    ----------
    recorded : int
        Traces that the store has.

    Raises
    ------
    ValueError
        If the directory holds another recording.
    """

    def __init__(self, directory: str | os.PathLike[str], recording: Recording) -> None:
        self.directory, self.recording = Path(directory), recording
        self._shards: list[Shard] = []
        if (self.directory / INDEX).exists():
            there, self._shards = read_index(self.directory)
            there.check(recording, self.directory / INDEX)

    @property
    def recorded(self) -> int:
        """How many traces the store has."""
        return sum(len(shard.names) for shard in self._shards)

    def add(self, traces: Sequence[RecordedTrace]) -> None:
        """Write one shard, then the index that lists it.

        Raises
        ------
        FloatingPointError
            If a number is NaN or infinite in the store's dtype, with the trace; nothing is written.
        """
        self.write(self.recording.encode(traces), [trace.name for trace in traces])

    def write(self, encoded: bytes, names: Sequence[str]) -> None:
        """Write a shard that :meth:`Recording.encode` made of the traces of these names, then the index."""
        file = f"shard-{len(self._shards):05d}.safetensors"
        write_atomic(self.directory / file, encoded)
        self._shards.append(Shard(file, list(names), hashlib.sha256(encoded).hexdigest()))
        shards = [asdict(shard) for shard in self._shards]
        index = sealed({"format": FORMAT, **asdict(self.recording), "shards": shards})
        write_atomic(self.directory / INDEX, json.dumps(index, indent=1) + "\n")


def read_index(directory: Path) -> tuple[Recording, list[Shard]]:
    """Return what a store holds, and its shards.

    Raises
    ------
    FileNotFoundError
        If there is no index.
    ValueError
        If it isn't one, or names files outside the directory.
    """
    path = directory / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no trace store, it has no {INDEX}: record one with `kvenv record`")
    index = read_json(path, "the index of a trace store")
    try:
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}, not {FORMAT!r}")
        hints = get_type_hints(Recording)
        for name, hint in hints.items():
            if not fits(index[name], hint):
                raise ValueError(f"{name} {index[name]!r} must be of type {getattr(hint, '__name__', hint)}")
        recording = Recording(**{name: index[name] for name in hints})
        for name, possible in (
            ("interval", recording.interval > 0),
            ("dtype", recording.dtype in DTYPES),
            ("reduce", recording.reduce in get_args(Reduce)),
        ):
            if not possible:
                raise ValueError(f"{name} {getattr(recording, name)!r} is impossible")
        shards = [
            Shard(str(shard["file"]), [str(name) for name in shard["names"]], shard.get("sha256"))
            for shard in index["shards"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the index of a trace store: {error}") from error
    for shard in shards:
        if not _SHARD.fullmatch(shard.file):
            raise ValueError(f"{path} names the shard {shard.file!r}: only shard-NNNNN.safetensors beside it is read")
    unsealed(index, path)
    return recording, shards
