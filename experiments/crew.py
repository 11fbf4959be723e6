"""A crew: workers on a Ray cluster among which calls are divided by their numbers, whoever dies meanwhile.

Every call is a function of what all calls share and of its item. So one whose worker died is made again by another, and
what a crew returns doesn't depend on how many workers it has. Nothing here knows what the workers do.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

TRIES = 3
"""Workers that may die of a call before it is given up."""

PATIENCE = 120.0
"""Seconds in which a new worker must be up; it imports PyTorch, loads the LLM and waits for its place on a node."""

AHEAD = 2
"""Calls per worker that wait, so that none is idle and what is done out of turn stays little."""


@dataclass(frozen=True)
class CrewArgs:
    """Where work is divided among how many workers."""

    ray: str | None = None
    """Divide the work among workers on a Ray cluster: its host:port, auto for the one running here, or local to start
    one for this command (extra kvenv[ray]). Results are those of one process, seed by seed."""
    workers: int = 2
    """Workers on the cluster, each with an LLM of its own."""
    worker_cpus: int = 1
    """CPU cores of a worker, and its threads."""
    worker_gpus: float | None = None
    """GPUs of a worker, 0.5 where two share one; if not given, one where --device is cuda."""

    def gpus(self, device: str) -> float:
        """Return the GPUs of a worker that computes on a device."""
        return float(device.startswith("cuda")) if self.worker_gpus is None else self.worker_gpus

    def connect(self) -> Any:
        """Return Ray, connected to the cluster.

        Raises
        ------
        ImportError
            If Ray isn't installed.
        ValueError
            If no cluster answers, or a number can't be.
        """
        for name, value, least in (
            ("workers", self.workers, 1),
            ("worker-cpus", self.worker_cpus, 1),
            ("worker-gpus", self.worker_gpus or 0, 0),
        ):
            if value < least:
                raise ValueError(f"--{name} {value} is impossible: it must be at least {least}")
        # Nobody's training is reported to anybody; whoever wants to sets it to 1.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise ImportError("--ray needs Ray: pip install 'kvenv[ray]'") from None
        if not ray.is_initialized():
            alone: dict[str, Any] = {"include_dashboard": False} if self.ray == "local" else {}
            try:
                ray.init(address=self.ray, logging_level=logging.WARNING, **alone)
            except (ConnectionError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"--ray {self.ray}: no cluster answers there ({reason})") from error
        return ray


class Host:
    """The actor: makes a worker when it is told to, and hands calls on to it."""

    def start(self, make: Callable[..., Any], arguments: Sequence[Any], threads: int) -> None:
        """Make the worker."""
        torch.set_num_threads(threads)
        self._worker = make(*arguments)

    def call(self, method: str, shared: Any, item: Any) -> Any:
        """Call a method of the worker."""
        return getattr(self._worker, method)(shared, item)


class Crew:
    """Workers that answer calls in the order of their numbers.

    Parameters
    ----------
    args : CrewArgs
        Where, and how many.
    make : callable
        Makes a worker, in its own process, from ``arguments``.
    arguments : sequence
        What it is made from; pickled.
    device : str
        Where the worker computes: on ``cuda`` it asks for a GPU.

    Raises
    ------
    ImportError
        If Ray isn't installed.
    ValueError
        If no cluster answers, or it has no room for the workers.
    """

    def __init__(self, args: CrewArgs, make: Callable[..., Any], arguments: Sequence[Any], device: str = "cpu") -> None:
        self._ray = args.connect()
        resources = {"num_cpus": args.worker_cpus, "num_gpus": args.gpus(device)}
        self._host = self._ray.remote(Host).options(**resources, max_restarts=0)
        self._threads, self._make, self._arguments = args.worker_cpus, make, self._ray.put(tuple(arguments))
        hired = [self._hire() for _ in range(args.workers)]
        up, _ = self._ray.wait([started for _, started in hired], num_returns=len(hired), timeout=PATIENCE)
        if len(up) < len(hired):
            room = self._ray.cluster_resources()
            raise ValueError(
                f"--workers {args.workers} of {resources['num_cpus']} CPUs and {resources['num_gpus']:g} GPUs: within "
                f"{PATIENCE:.0f} s {len(up)} were up; the cluster has {room.get('CPU', 0):g} CPUs and "
                f"{room.get('GPU', 0):g} GPUs in all"
            )
        for _, started in hired:
            self._get(started)
        self._workers = [worker for worker, _ in hired]

    def __len__(self) -> int:
        return len(self._workers)

    def map(self, method: str, shared: Any, items: Sequence[Any]) -> Iterator[Any]:
        """Call a method of the workers for every item, and yield what it returns in the order of the items.

        Parameters
        ----------
        method : str
            Of the worker; it is called with ``shared`` and the item.
        shared : Any
            Sent once to every node.
        items : sequence
            Item i goes to worker i modulo their number, as long as all live.

        Raises
        ------
        Exception
            What the method raised.
        RuntimeError
            If workers die of the same call again and again, or none is left.
        """
        sent, waiting, done = self._ray.put(shared), dict[Any, tuple[int, Any]](), dict[int, Any]()
        deaths = [0] * len(items)
        following = 0

        def send(number: int) -> None:
            worker = self._workers[number % len(self._workers)]
            waiting[worker.call.remote(method, sent, items[number])] = number, worker

        for due in range(len(items)):
            while due not in done:
                while following < min(len(items), due + AHEAD * len(self._workers)):
                    send(following)
                    following += 1
                (first,), _ = self._ray.wait(list(waiting), num_returns=1)
                number, worker = waiting.pop(first)
                try:
                    done[number] = self._get(first)
                except self._ray.exceptions.RayError as error:
                    deaths[number] += 1
                    self._replace(worker, error)
                    if deaths[number] == TRIES:
                        raise RuntimeError(f"{TRIES} workers died of {method} {items[number]}: {error}") from error
                    send(number)
            yield done.pop(due)

    def close(self) -> None:
        """Dismiss the workers; a cluster that was started for them ends with this process."""
        for worker in self._workers:
            self._ray.kill(worker)

    def _hire(self) -> tuple[Any, Any]:
        """Return a new worker, and what says that it is up."""
        worker = self._host.remote()
        return worker, worker.start.remote(self._make, self._arguments, self._threads)

    def _get(self, reference: Any) -> Any:
        """Return a call's result, or raise what the worker itself raised."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def _replace(self, worker: Any, error: Exception) -> None:
        """Put another worker in the place of a dead one, or go on without, if the cluster has no room for it."""
        if worker not in self._workers:
            return  # another of its calls has told already
        reason = str(error).strip().splitlines()[0]
        self._ray.kill(worker)
        number = self._workers.index(worker)
        new, started = self._hire()
        up, _ = self._ray.wait([started], timeout=PATIENCE)
        if up:
            warnings.warn(f"worker {number} died and was replaced: {reason}", stacklevel=3)
            self._get(started)
            self._workers[number] = new
            return
        self._ray.kill(new)
        del self._workers[number]
        if not self._workers:
            raise RuntimeError(f"the last worker died, and no other came up within {PATIENCE:.0f} s: {reason}")
        warnings.warn(
            f"worker {number} died, no other came up within {PATIENCE:.0f} s, {len(self._workers)} go on: {reason}",
            stacklevel=3,
        )


@contextmanager
def hired(args: CrewArgs, make: Callable[..., Any], arguments: Sequence[Any], device: str) -> Iterator[Crew | None]:
    """Give a crew, see :class:`Crew`, and dismiss it at the end; None where no cluster is named."""
    if args.ray is None:
        yield None
        return
    with closing(Crew(args, make, arguments, device)) as crew:
        yield crew
