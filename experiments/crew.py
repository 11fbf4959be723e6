"""A crew: workers on a Ray cluster among which calls are divided by their numbers, whoever dies meanwhile.

Every call is a function of what all calls share and of its item. So one whose worker died is made again by another, and
what a crew returns doesn't depend on how many workers it has. Nothing here knows what the workers do.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvenv.memory import LOWER

TRIES = 3
"""Workers that may die of a call before it is given up."""

PATIENCE = 120.0
"""Seconds in which a new worker must have its place on a node; what it loads there may take longer."""

REACHABLE = 10.0
"""Seconds in which the cluster's port must answer; Ray itself asks for minutes."""

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
        if not self.ray:
            raise ValueError(f"--ray {self.ray!r} is no address: give host:port, auto or local")
        # Nobody's training is reported to anybody; whoever wants to sets it to 1.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise ImportError("--ray needs Ray: pip install 'kvenv[ray]'") from None
        if not ray.is_initialized():
            alone: dict[str, Any] = {"include_dashboard": False} if self.ray == "local" else {}
            try:
                self._reach()
                ray.init(address=self.ray, logging_level=logging.WARNING, **alone)
            except (OSError, OverflowError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"--ray {self.ray}: no cluster answers there ({reason})") from error
            except RuntimeError as error:  # of another version of Ray or Python
                raise ValueError(f"--ray {self.ray}: {' '.join(str(error).split())}") from error
        return ray

    def _reach(self) -> None:
        """Raise an OSError if nobody listens at host:port."""
        host, colon, port = (self.ray or "").rpartition(":")
        if colon and port.isdecimal() and "/" not in host:
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACHABLE).close()


class Host:
    """The actor: makes a worker when it is told to, and hands calls on to it."""

    def start(self, make: Callable[..., Any], arguments: Sequence[Any], threads: int, directory: str) -> None:
        """Make the worker, in the command's working directory if the node has it: names of files may be relative."""
        if os.path.isdir(directory):
            os.chdir(directory)
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
    ChildProcessError
        If workers die of their start again and again.
    """

    def __init__(self, args: CrewArgs, make: Callable[..., Any], arguments: Sequence[Any], device: str = "cpu") -> None:
        self._ray = args.connect()
        resources = {"num_cpus": args.worker_cpus, "num_gpus": args.gpus(device)}
        self._host = self._ray.remote(Host).options(**resources, max_restarts=0)
        self._threads, self._make, self._arguments = args.worker_cpus, make, self._ray.put(tuple(arguments))
        self._late: dict[Any, Any] = {}
        hired = [self._hire() for _ in range(args.workers)]
        self._workers = [worker for each in hired if (worker := self._up(*each))]
        if len(self) < len(hired):
            self.close()
            room = self._ray.cluster_resources()
            raise ValueError(
                f"--workers {args.workers} of {resources['num_cpus']} CPUs and {resources['num_gpus']:g} GPUs: within "
                f"{PATIENCE:.0f} s {len(self)} were up; the cluster has {room.get('CPU', 0):g} CPUs and "
                f"{room.get('GPU', 0):g} GPUs in all"
            )

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
        ChildProcessError
            If workers die of the same call again and again, or none is left.
        """
        self._welcome(0.0)
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
                        raise ChildProcessError(_given_up(f"{method} {items[number]}")) from error
                    send(number)
            yield done.pop(due)

    def close(self) -> None:
        """Dismiss the workers; a cluster that was started for them ends with this process."""
        for worker in (*self._workers, *self._late.values()):
            self._ray.kill(worker)

    @property
    def _patience(self) -> float:
        """Seconds to wait for a place; none while another waits: a node of eight workers may have gone."""
        return 0.0 if self._late else PATIENCE

    def _hire(self) -> tuple[Any, Any, Any]:
        """Return a new worker, what says that it has its place, and what says that it is up."""
        worker = self._host.remote()
        placed = worker.__ray_ready__.remote()
        return worker, placed, worker.start.remote(self._make, self._arguments, self._threads, os.getcwd())

    def _up(self, worker: Any, placed: Any, started: Any) -> Any:
        """Return a new worker once it is up, or another if it dies of that; None if the cluster has no place for it."""
        for _ in range(TRIES):
            if not self._ray.wait([placed], timeout=self._patience)[0]:
                self._late[started] = worker
                return None
            try:
                self._get(started)
            except self._ray.exceptions.RayError:
                worker, placed, started = self._hire()
            else:
                return worker
        self._ray.kill(worker)
        raise ChildProcessError(_given_up("their start"))

    def _welcome(self, patience: float) -> None:
        """Take in a worker that found no place when it was hired, if one is up by now."""
        for started in self._ray.wait(list(self._late), timeout=patience)[0] if self._late else ():
            worker = self._late.pop(started)
            try:
                self._get(started)
            except self._ray.exceptions.RayError:
                return  # it has died, too
            self._workers.append(worker)
            warnings.warn(f"another worker came up, {len(self)} go on", stacklevel=3)

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
        patience, new = self._patience, self._up(*self._hire())
        if new:
            warnings.warn(f"worker {number} died and was replaced: {reason}", stacklevel=3)
            self._workers[number] = new
            return
        del self._workers[number]
        if not self._workers:
            self._welcome(PATIENCE)
        if not self._workers:
            raise ChildProcessError(f"the last worker died, and no other came up within {PATIENCE:.0f} s: {reason}")
        warnings.warn(
            f"worker {number} died, no other came up within {patience:.0f} s, {len(self)} go on: {reason}", stacklevel=3
        )


def _given_up(what: str) -> str:
    """Return what is told of workers that die again and again, which they can't tell themselves."""
    return f"{TRIES} workers died of {what}, killed or crashed, most often for want of memory: {LOWER}"


@contextmanager
def hired(args: CrewArgs, make: Callable[..., Any], arguments: Sequence[Any], device: str) -> Iterator[Crew | None]:
    """Give a crew, see :class:`Crew`, and dismiss it at the end; None where no cluster is named."""
    if args.ray is None:
        yield None
        return
    with closing(Crew(args, make, arguments, device)) as crew:
        yield crew
