"""Recorded traces: pairs and utilities of one full-cache pass, so that ranking is learned without the LLM.

A store is a directory of safetensors shards and ``index.json``, which lists them. A shard is written whole, then the
index that names it: what a killed recording leaves is a smaller store. Shards are read memory-mapped, so that opening
a store doesn't read them: whether their bits are those that were written, :meth:`TraceStore.verify` says.

The utility of a pair at a cut n is one of golden's (:mod:`kvenv.golden`): ForesightKV's largest mean over a window of
the trace's queries j >= n and the group (``reduce="max"``), or KVP's sum over these queries of the largest attention in
the group of query heads (``"sum"``). It is recorded at the cuts n = W, 2W, ... only, which are where evictions happen;
a cut's utilities concern its n pairs only, so they take T² / 2W numbers per head, not T² / W.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import get_args, get_type_hints, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.checks import fits
from kvenv.decode import collate, read
from kvenv.files import digest, read_json, sealed, unsealed, write_atomic
from kvenv.golden import RecordingCache, Reduce
from kvenv.identity import Architecture, ModelIdentity, architecture, fingerprint
from kvenv.models import LoadedModel, load_model
from kvenv.rotary import Rotary
from kvenv.traces import FAMILIES, Trace, load_traces

INDEX = "index.json"
FORMAT = "kvenv trace store 1"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
TENSORS = ("keys", "values", "utility", "tokens")

_SHARD = re.compile(r"shard-\d{5,}\.safetensors")


@dataclass(frozen=True)
class RecordedTrace:
    """One trace's pairs and what they turn out to be worth.

    Shapes: L layers, H KV heads, D head dimension, S = T - 1 pairs (a trace's last token is only a target).

    Attributes
    ----------
    name : str
        The trace's.
    interval : int
        W, the distance between two cuts.
    keys, values : Tensor (L, H, S, D)
        The pairs, keys with their rotary phase.
    utility : Tensor (L, H, P) float32
        Utilities at all cuts, one cut after the other: W numbers, 2W numbers, ...
    tokens : Tensor (T,) int64
        Token ids.
    rotary : Rotary
        The LLM's rotary embedding, which turned the keys.
    """

    name: str
    interval: int
    keys: Tensor
    values: Tensor
    utility: Tensor
    tokens: Tensor
    rotary: Rotary

    @property
    def cuts(self) -> range:
        """The numbers n of cached pairs at which utilities are known; each leaves at least one future query."""
        return cuts(len(self.tokens), self.interval)

    def utility_at(self, cut: int) -> Tensor:
        """Return the utilities (L, H, n) of the first n = ``cut`` pairs.

        Raises
        ------
        ValueError
            If there is no such cut.
        """
        if cut not in self.cuts:
            raise ValueError(
                f"cut {cut} of trace {self.name!r} is not recorded: choose a multiple of {self.interval} from "
                f"{self.cuts[0]} to {self.cuts[-1]}"
            )
        start = _packed(self.interval, cut // self.interval - 1)
        return self.utility[..., start : start + cut]


def cuts(length: int, interval: int) -> range:
    """Return the cuts of a trace of ``length`` tokens."""
    return range(interval, length - 1, interval)


def record(
    model: PreTrainedModel, traces: Sequence[Trace], interval: int, reduce: Reduce = "max"
) -> list[RecordedTrace]:
    """Run traces through the full cache once, side by side.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM on kvenv's attention (:func:`kvenv.load_model`).
    traces : sequence of Trace
        What to record.
    interval : int
        W, the distance between two cuts.
    reduce : {"max", "sum"}
        ForesightKV's utility or KVP's, see :class:`kvenv.golden.RecordingCache`. Keeping what has the largest sum isn't
        enough at small budgets, even if the future is known: what is needed once is lost to what is always seen a bit.

    Raises
    ------
    ValueError
        If the interval is below 1 or a trace too short to have a cut.
    """
    if interval < 1:
        raise ValueError(f"interval {interval} is impossible: it must be at least 1")
    for trace in traces:
        if not cuts(len(trace.tokens), interval):
            raise ValueError(
                f"trace {trace.name!r} has {len(trace.tokens)} tokens: with interval {interval} a cut that leaves a "
                f"future needs at least {interval + 2}"
            )
    batch = collate([trace.tokens for trace in traces], interval=interval, device=model.device)
    cache = RecordingCache(model, interval=interval, reduce=reduce, keep_pairs=True)
    read(model, cache, batch.tokens, batch.positions, batch.valid)
    future = cache.future(batch.pad).utility.float()
    recorded, rotary = [], Rotary.of(model)
    for row, trace in enumerate(traces):
        pairs = slice(0, len(trace.tokens) - 1)
        keys, values = (torch.stack([pair[which][row, :, pairs] for pair in cache.pairs]) for which in (0, 1))
        utility = [future[:, row, :, n // interval, :n] for n in cuts(len(trace.tokens), interval)]
        tokens = torch.as_tensor(np.asarray(trace.tokens), dtype=torch.int64)
        recorded.append(RecordedTrace(trace.name, interval, keys, values, torch.cat(utility, dim=-1), tokens, rotary))
    return recorded


@lru_cache(maxsize=1)
def sample() -> list[RecordedTrace]:
    """Return a small recording of the bundled LLM, made once per process: one trace of each family, 256 tokens."""
    loaded = load_model("tiny")
    source = load_traces("+".join(FAMILIES), tokenizer=loaded.tokenizer, trace_length=256)
    return record(loaded.model, [source[i] for i in range(len(FAMILIES))], 16)


@dataclass(frozen=True)
class Recording:
    """What a store holds: recording goes on, or a policy is trained, only where all of it fits.

    Attributes
    ----------
    model, fingerprint : str
        The LLM's name, and the hash of its weights.
    layers, kv_heads, head_dim : int
        L, H, D.
    inv_freq, rotary_scaling : list of float, float
        The LLM's rotary embedding.
    traces, split : str
        Name and split of the traces.
    trace_length, first_trace : int
        Tokens of a trace (the most, where traces differ); id of the first.
    interval : int
        W, the distance between two cuts.
    reduce : str
        Which utility: "sum" or "max".
    dtype : str
        Of keys and values.
    """

    model: str
    fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int
    inv_freq: list[float]
    rotary_scaling: float
    traces: str
    split: str
    trace_length: int
    first_trace: int
    interval: int
    reduce: str
    dtype: str

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        *,
        traces: str,
        split: str,
        trace_length: int,
        first_trace: int = 0,
        interval: int = 16,
        reduce: Reduce = "max",
        dtype: str | None = None,
    ) -> Recording:
        """Describe a recording of an LLM; pairs are kept in the LLM's dtype if no other is given."""
        cache, rotary = RecordingCache(loaded.model, interval=interval), Rotary.of(loaded.model)
        own = next(name for name, known in DTYPES.items() if known == loaded.model.dtype)
        return cls(
            loaded.name,
            fingerprint(loaded.model),
            cache.num_layers,
            cache.kv_heads,
            cache.head_dim,
            rotary.inv_freq.tolist(),
            rotary.scaling,
            traces,
            split,
            trace_length,
            first_trace,
            interval,
            reduce,
            dtype or own,
        )

    @property
    def identity(self) -> ModelIdentity:
        """Which LLM was recorded."""
        known = Architecture(
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            inv_freq=tuple(self.inv_freq),
            rotary_scaling=self.rotary_scaling,
        )
        return ModelIdentity(self.model, self.fingerprint, known)

    @property
    def trace_nbytes(self) -> int:
        """Bytes of a trace of ``trace_length`` tokens."""
        pairs = 2 * (self.trace_length - 1) * self.head_dim * DTYPES[self.dtype].itemsize
        packed = _packed(self.interval, len(cuts(self.trace_length, self.interval)))
        return self.layers * self.kv_heads * (pairs + 4 * packed) + 8 * self.trace_length

    def check(self, other: Recording, where: object) -> None:
        """Refuse a recording that isn't this one.

        Raises
        ------
        ValueError
            Naming the first difference.
        """
        for name, value in asdict(self).items():
            given = getattr(other, name)
            if given != value:
                raise ValueError(f"{where} was recorded with {name} {value!r}, not {given!r}: choose another directory")


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
            "utility": ((*heads, _packed(made.interval, len(trace.cuts))), torch.float32),
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
        """Write one shard, then the index that lists it."""
        dtype = DTYPES[self.recording.dtype]
        tensors = {}
        for number, trace in enumerate(traces):
            for name in TENSORS:
                tensor = getattr(trace, name)
                tensor = tensor.to(dtype) if name in ("keys", "values") else tensor
                tensors[f"{number}.{name}"] = tensor.cpu().contiguous()
        file = f"shard-{len(self._shards):05d}.safetensors"
        content = save(tensors)
        write_atomic(self.directory / file, content)
        self._shards.append(Shard(file, [trace.name for trace in traces], hashlib.sha256(content).hexdigest()))
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


def _packed(interval: int, count: int) -> int:
    """Return how many utilities the first ``count`` cuts have: W + 2W + ..."""
    return interval * count * (count + 1) // 2
