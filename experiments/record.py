"""Record a trace store: keys, values and utilities of full-cache passes, from which kvp learns without the LLM."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from experiments.cli import run
from experiments.crew import CrewArgs, hired
from experiments.progress import track
from experiments.results import named
from kvenv.golden import Reduce
from kvenv.identity import check_fingerprint
from kvenv.lock import hold
from kvenv.models import load_model
from kvenv.recording import Recording, record
from kvenv.store import StoreWriter
from kvenv.traces import load_traces


@dataclass
class Args:
    """Record a trace store, or go on with one that was interrupted."""

    out: Path = Path("runs/store")
    """Directory of the store."""
    traces: str = "recall+tracking+dialogue+reasoning"
    """A trace family, several joined by +, a .txt or .jsonl file, hf: and the name of a Hugging Face dataset, or a
    registered name."""
    split: str = "train"
    """Split of the traces: train, validation or test."""
    num_traces: int = 200
    """Traces that the store has at the end."""
    first_trace: int = 0
    """Id of the first trace in the split's sequence."""
    trace_length: int = 512
    """Tokens of a trace."""
    interval: int = 16
    """Tokens between two cuts at which utilities are recorded."""
    utility: Reduce = "max"
    """What a pair is worth: the largest mean attention of a future window (max, ForesightKV), or the sum of all future
    attention (sum, KVP's paper), which at small budgets loses what is needed once to what is always seen a bit."""
    half: bool = False
    """Store keys and values as float16 instead of in the LLM's dtype."""
    model: str = "tiny"
    """The LLM: tiny, a directory, a hub id or a registered name."""
    dtype: str = "float32"
    """Data type of the LLM."""
    device: str = "cpu"
    """cpu or cuda."""
    batch_size: int = 16
    """Traces decoded side by side, and in a shard."""
    crew: tyro.conf.OmitArgPrefixes[CrewArgs] = field(default_factory=CrewArgs)


class Recorder:
    """An LLM and its traces, from which shards are made."""

    def __init__(self, args: Args) -> None:
        self.args = args
        self.loaded = load_model(args.model, dtype=args.dtype, device=args.device)
        self.loaded.check_length(args.trace_length)
        self.source = load_traces(
            args.traces, split=args.split, tokenizer=self.loaded.tokenizer, trace_length=args.trace_length
        )
        last = args.first_trace + args.num_traces
        if self.source.size is not None and last > self.source.size:
            raise ValueError(f"traces {args.traces!r} are {self.source.size}: first_trace + num_traces asks for {last}")

    def shard(self, recording: Recording, ids: range) -> tuple[bytes, list[str]]:
        """Return the shard of some traces, and their names; on another node the LLM may be another."""
        check_fingerprint(self.loaded.model, recording.fingerprint)
        traces = [self.source[i] for i in ids]
        recorded = record(self.loaded.model, traces, recording.interval, self.args.utility)
        return recording.encode(recorded), [trace.name for trace in traces]


def record_store(args: Args) -> None:
    """Record what the store lacks, a shard at a time; say before how large it will be.

    Raises
    ------
    ValueError
        If an argument is impossible, another process records there, or the store is another recording's.
    """
    for name, value in (("num_traces", args.num_traces), ("batch_size", args.batch_size), ("interval", args.interval)):
        if value < 1:
            raise ValueError(f"{name} {value} is impossible: it must be at least 1")
    if args.first_trace < 0:
        raise ValueError(f"first_trace {args.first_trace} is impossible: it must be at least 0")
    with hold(args.out):
        _record(args)


def _record(args: Args) -> None:
    """Record where nobody else writes."""
    recorder = Recorder(args)
    recording = Recording.of(
        recorder.loaded,
        # A file that was edited is another one.
        traces=named(args.traces, Path(args.traces)) if Path(args.traces).is_file() else args.traces,
        split=args.split,
        trace_length=args.trace_length,
        first_trace=args.first_trace,
        interval=args.interval,
        reduce=args.utility,
        dtype="float16" if args.half else None,
    )
    writer = StoreWriter(args.out, recording)
    announce(args, recording.trace_nbytes, writer.recorded)
    last = args.first_trace + args.num_traces
    starts = range(args.first_trace + writer.recorded, last, args.batch_size)
    missing = [range(start, min(start + args.batch_size, last)) for start in starts]
    with hired(args.crew, Recorder, (args,), args.device) as crew:
        shards = crew.map("shard", recording, missing) if crew else (recorder.shard(recording, ids) for ids in missing)
        for shard in track(shards, "recording", total=len(missing)):
            writer.write(*shard)


def announce(args: Args, trace_nbytes: int, recorded: int) -> None:
    """Print how large the store gets.

    Raises
    ------
    ValueError
        If the disk has no room for it.
    """
    there = args.out.resolve()
    while not there.exists():
        there = there.parent
    free, missing = shutil.disk_usage(there).free, trace_nbytes * max(0, args.num_traces - recorded)
    print(
        f"{args.out}: {args.num_traces} traces of at most {args.trace_length} tokens, at most "
        f"{trace_nbytes * args.num_traces / 1e6:,.1f} MB; {recorded} are there, {missing / 1e6:,.1f} MB to go",
        flush=True,
    )
    if missing > free:
        raise ValueError(f"{missing / 1e9:,.1f} GB don't fit on the disk of {args.out}: {free / 1e9:,.1f} GB are free")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = tyro.cli(Args, args=argv, prog="kvenv record")
    record_store(args)
    print(f"store: {args.out}")


if __name__ == "__main__":
    run(main)
