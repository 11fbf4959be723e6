"""Recorded traces: pairs and utilities of one full-cache pass, so that ranking is learned without the LLM.

The utility of a pair at a cut n is one of golden's (:mod:`kvenv.golden`): ForesightKV's largest mean over a window of
the trace's queries j >= n and the group (``reduce="max"``), or KVP's sum over these queries of the largest attention in
the group of query heads (``"sum"``). It is recorded at the cuts n = W, 2W, ... only, which are where evictions happen;
a cut's utilities concern its n pairs only, so they take T² / 2W numbers per head, not T² / W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.decode import collate, read
from kvenv.finite import check_finite
from kvenv.golden import RecordingCache, Reduce
from kvenv.identity import Architecture, ModelIdentity, fingerprint
from kvenv.memory import side_by_side
from kvenv.models import LoadedModel, load_model
from kvenv.rotary import Rotary
from kvenv.traces import FAMILIES, Trace, load_traces

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
TENSORS = ("keys", "values", "utility", "tokens")
"""What a recorded trace has."""


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
        start = packed(self.interval, cut // self.interval - 1)
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
    MemoryError
        If memory runs out; it names rows and tokens.
    """
    if interval < 1:
        raise ValueError(f"interval {interval} is impossible: it must be at least 1")
    for trace in traces:
        if not cuts(len(trace.tokens), interval):
            raise ValueError(
                f"trace {trace.name!r} has {len(trace.tokens)} tokens: with interval {interval} a cut that leaves a "
                f"future needs at least {interval + 2}"
            )
    with side_by_side(len(traces), max(len(trace.tokens) for trace in traces)):
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
        utilities = packed(self.interval, len(cuts(self.trace_length, self.interval)))
        return self.layers * self.kv_heads * (pairs + 4 * utilities) + 8 * self.trace_length

    def encode(self, traces: Sequence[RecordedTrace]) -> bytes:
        """Return a shard of traces, as safetensors.

        Raises
        ------
        FloatingPointError
            If a number is NaN or infinite in the store's dtype, with the trace.
        """
        dtype, tensors = DTYPES[self.dtype], {}
        for number, trace in enumerate(traces):
            for name in TENSORS:
                tensor = getattr(trace, name)
                tensor = tensor.to(dtype) if name in ("keys", "values") else tensor
                check_finite(f"{name} in {self.dtype}", tensor[None], partial(list, [trace.name]))
                tensors[f"{number}.{name}"] = tensor.cpu().contiguous()
        return save(tensors)

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


def packed(interval: int, count: int) -> int:
    """Return how many utilities the first ``count`` cuts have: W + 2W + ..."""
    return interval * count * (count + 1) // 2
