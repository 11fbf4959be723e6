"""What more workers are worth: updates and recordings by crews on Ray beside one process, and what crosses between."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.grpo import GRPOConfig
from agents.kvp import KVPConfig
from agents.learner import SharedLearner
from experiments.bench.measure import Row, Times, alternate
from experiments.crew import Crew, CrewArgs
from experiments.learners import GRPO, KVP, DecodingArgs, RolloutArgs, RunArgs, SharedArgs
from experiments.record import Args, Recorder, record_store
from experiments.replicas import Replicas
from kvenv.recording import Recording

REPEATS, TRACES, SHARD = 7, 8, 4
BYTES = 64 << 20
"""Of what is sent and returned to find the rates."""


def rows(device: str) -> Iterator[Row]:
    """Measure on a cluster of this machine alone, a worker per core or GPU at most, one thread in each process."""
    torch.set_num_threads(1)
    most = torch.cuda.device_count() if device.startswith("cuda") else os.cpu_count() or 1
    counts = sorted({1, *(2**power for power in range(1, most.bit_length()) if 2**power <= most), most})
    # Crews of all sizes are there at once, so that they can be measured in turn; those that wait take nothing.
    gpus = 1 / len(counts) if device.startswith("cuda") else 0.0
    crews = [CrewArgs("local", workers=count, worker_gpus=gpus) for count in counts]
    with _cluster(sum(counts)):
        yield from _messages(crews[0])
        with tempfile.TemporaryDirectory() as directory:
            yield from _updates(_grpo(device), crews)
            yield from _updates(_kvp(Path(directory), device), crews)
        yield from _recordings(crews, device)


def _grpo(device: str) -> SharedArgs:
    config = GRPOConfig(num_traces=TRACES, at_once=1)
    return GRPO(RolloutArgs(device=device), config, RunArgs(eval_every=0))


def _kvp(directory: Path, device: str) -> SharedArgs:
    record_store(Args(out=directory / "store", num_traces=32, device=device))
    return KVP(DecodingArgs(device=device), KVPConfig(), RunArgs(eval_every=0), store=directory / "store")


def _updates(args: SharedArgs, crews: list[CrewArgs]) -> Iterator[Row]:
    """Measure updates of a learner here and by crews, and the bytes that a part of one costs."""
    here: SharedLearner = args.build()
    case = f"{args.name}, {here.parts} parts"
    with ExitStack() as stack:
        sides: dict[str, Any] = {"here": here.update}
        for crew in crews:
            shared = replace(args, crew=crew)
            replicas = stack.enter_context(closing(Replicas(shared, shared.build())))
            sides[f"{crew.workers} workers"] = replicas.update
        yield from _efficiency(case, alternate(sides, REPEATS, device=args.env.device), crews)
    yield Row("scaleout", case, "weights, to every node", sum(x.nbytes for x in here.weights().values()) / 1e6, "MB")
    shares = [here.share(part, 0) for part in range(here.parts)]
    yield Row("scaleout", case, "gradient of a part", sum(x.nbytes for x in shares[0].gradients) / 1e6, "MB")
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        here.step(shares)
        times.append(time.perf_counter() - began)
    yield Row("scaleout", case, "the learner's own step", 1e3 * float(np.median(times)), "ms")


def _recordings(crews: list[CrewArgs], device: str) -> Iterator[Row]:
    """Measure the making of shards of recorded traces, which are written by the driver."""
    args = Args(num_traces=TRACES * SHARD, batch_size=SHARD, device=device)
    recorder = Recorder(args)
    recording = Recording.of(recorder.loaded, traces=args.traces, split=args.split, trace_length=args.trace_length)
    ids = [range(start, start + SHARD) for start in range(0, TRACES * SHARD, SHARD)]
    with ExitStack() as stack:
        sides: dict[str, Any] = {"here": lambda: [recorder.shard(recording, some) for some in ids]}
        for crew in crews:
            made = stack.enter_context(closing(Crew(crew, Recorder, (args,), device)))
            sides[f"{crew.workers} workers"] = lambda made=made: list(made.map("shard", recording, ids))
        case = f"record, {len(ids)} shards of {SHARD} traces"
        yield from _efficiency(case, alternate(sides, REPEATS, device=device), crews)
    size = len(recorder.shard(recording, ids[0])[0])
    yield Row("scaleout", case, "a shard, to the driver", size / 1e6, "MB")


def _efficiency(case: str, times: Times, crews: list[CrewArgs]) -> Iterator[Row]:
    """Yield how long each crew takes, beside one process as often as it has workers."""
    here = 1e3 * float(np.median(times["here"]))
    for crew in crews:
        name = f"{crew.workers} workers"
        taken, paired = 1e3 * float(np.median(times[name])), times["here"] / times[name] / crew.workers
        spread = float(np.subtract(*np.percentile(paired, [75, 25]))) / 2
        efficiency = here / taken / crew.workers
        yield Row("scaleout", case, f"efficiency of {name}", taken, "ms", here, efficiency, spread)


class Echo:
    """A worker that does nothing."""

    def take(self, shared: np.ndarray, item: Any) -> int:
        """Take something."""
        return len(shared)

    def give(self, shared: None, item: int) -> np.ndarray:
        """Give so many bytes."""
        return np.ones(item, dtype=np.uint8)


def _messages(args: CrewArgs) -> Iterator[Row]:
    """Measure how long a call takes in which nothing is done, and the rate of what is sent and returned."""
    large = np.ones(BYTES, dtype=np.uint8)
    with closing(Crew(args, Echo, ())) as crew:
        times = alternate(
            {
                "call": lambda: list(crew.map("take", np.ones(1), [0])),
                "sent": lambda: list(crew.map("take", large, [0])),
                "returned": lambda: list(crew.map("give", None, [BYTES])),
            },
            4 * REPEATS,
        )
    call = float(np.median(times["call"]))
    yield Row("scaleout", "messages", "a call", 1e3 * call, "ms")
    for name in ("sent", "returned"):
        yield Row("scaleout", "messages", name, BYTES / 1e9 / (float(np.median(times[name])) - call), "GB/s")


@contextmanager
def _cluster(room: int) -> Iterator[None]:
    """Start Ray on this machine, with room for so many workers whether or not it has the cores."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=room, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
