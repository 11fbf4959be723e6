"""Many long jobs on a few processes: what is done stays done, and a second call goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from experiments.progress import PLAIN_SECONDS
from kvenv.files import read_json, write_atomic

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    # Freed memory is kept: giving it back and asking for it anew costs a rollout a quarter of its time.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""What a job's process is started with: two threads of one are slower than one of each of two."""


@dataclass(frozen=True)
class Job:
    """Something to be done once, in a process of its own.

    Attributes
    ----------
    name : str
        What it is called in the log of times, and in progress lines.
    work : callable
        Of a module's top level; called with ``arguments``.
    arguments : tuple
        Picklable.
    result : Path
        A file that exists when the job is done, and not before.
    after : tuple of str
        Names of jobs that must be done before.
    """

    name: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    result: Path
    after: tuple[str, ...] = ()


def run_jobs(jobs: Sequence[Job], processes: int, times: Path) -> None:
    """Do what isn't done, in the order given where several are ready.

    Parameters
    ----------
    jobs : sequence of Job
        With those they come after.
    processes : int
        How many at a time.
    times : Path
        JSON file that the seconds of each job are added to.

    Raises
    ------
    ValueError
        If ``processes`` is below 1, or no job can begin because of what it comes after.
    """
    if processes < 1:
        raise ValueError(f"processes {processes} is impossible: it must be at least 1")
    todo = [job for job in jobs if not job.result.exists()]
    done = {job.name for job in jobs} - {job.name for job in todo}
    running: dict[Future[None], tuple[Job, float]] = {}
    os.environ.update(ONE_THREAD)
    began = due = time.monotonic()
    spawn = get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=_end_with_parent, max_tasks_per_child=1) as pool:
        try:
            while todo or running:
                ready = [job for job in todo if set(job.after) <= done]
                for job in ready[: processes - len(running)]:
                    todo.remove(job)
                    running[pool.submit(job.work, *job.arguments)] = (job, time.monotonic())
                if not running:
                    names = ", ".join(job.name for job in todo)
                    raise ValueError(f"jobs {names} come after jobs that don't exist, or after each other")
                for future in wait(running, timeout=PLAIN_SECONDS, return_when=FIRST_COMPLETED).done:
                    job, start = running.pop(future)
                    try:
                        future.result()
                    finally:
                        _add_time(times, job.name, time.monotonic() - start)
                    done.add(job.name)
                if time.monotonic() >= due:
                    due = time.monotonic() + PLAIN_SECONDS
                    names = ", ".join(job.name for job, _ in running.values())
                    minutes = (time.monotonic() - began) / 60
                    line = f"{len(done)}/{len(jobs)} jobs done after {minutes:.0f} min; running {names}"
                    print(line, file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def read_times(path: Path) -> dict[str, float]:
    """Return the seconds of each job so far."""
    return dict(read_json(path, "the times of jobs")) if path.exists() else {}


def _end_with_parent() -> None:
    """Let a job's process be told to end (SIGTERM, at which trainings save) when whoever started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _add_time(path: Path, name: str, seconds: float) -> None:
    """Add to a job's seconds; an interrupted job has had several turns."""
    times = read_times(path)
    times[name] = times.get(name, 0.0) + seconds
    write_atomic(path, json.dumps(times, indent=1) + "\n")
