"""Run directories: what was trained how, every metric of every step, checkpoints, and the policy.

    RUN/config.json          learner, arguments, commit
    RUN/metrics.jsonl        one line per step
    RUN/checkpoints/         the newest two
    RUN/policy/              of the newest checkpoint
    RUN/events.out.tfevents* the same metrics for TensorBoard, and pictures

A checkpoint comes after all that belongs to its step, and what lies behind it is cut off when a run goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar, get_type_hints

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

import kvenv
from agents.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from agents.learner import Learner, State
from kvenv.checks import fits
from kvenv.files import (
    DISK_ERRORS,
    check_writable,
    naming,
    read_json,
    read_lines,
    remove_leftovers,
    sealed,
    unsealed,
    write_atomic,
)

CONFIG, METRICS, CHECKPOINTS, POLICY = "config.json", "metrics.jsonl", "checkpoints", "policy"
SHOWN = ("eval/answer_loss", "eval/answer_accuracy", "rollout/ep_rew_mean")
"""Metrics that TensorBoard's page of hyper-parameters shows."""

Arguments = TypeVar("Arguments")


class Run:
    """A run directory.

    Parameters
    ----------
    directory : Path
        Where it is, with a ``config.json``.

    Raises
    ------
    ValueError
        If it is no run directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_config(directory)
        self.seconds = 0.0
        self._metrics: IO[str] | None = None
        self._events: SummaryWriter | None = None

    @classmethod
    def create(cls, directory: Path, learner: str, arguments: Any, made_from: Mapping[str, Any] | None = None) -> Run:
        """Make a run directory.

        Parameters
        ----------
        directory : Path
            Where.
        learner : str
            Who learns.
        arguments : dataclass
            All that it was told.
        made_from : mapping, optional
            Digests of what it learns with and from, see :meth:`check_made_from`.

        Raises
        ------
        ValueError
            If there is one already.
        """
        if (directory / CONFIG).exists():
            raise ValueError(f"--out {directory} holds a run: --resume {directory}, or choose another directory")
        config = {
            "learner": learner,
            "arguments": to_json(arguments),
            "made_from": dict(made_from or {}),
            "commit": commit(),
            "version": kvenv.__version__,
        }
        write_config(directory, config)
        return cls(directory)

    def check_made_from(self, made_from: Mapping[str, Any]) -> None:
        """Refuse to go on with another LLM or other data than the run was begun with, as far as their digests tell.

        Raises
        ------
        ValueError
            Naming the first that differs, with both digests.
        """
        for name, (was, now) in changed(self.config.get("made_from", {}), made_from).items():
            if was is not None:  # runs of before digests have none
                raise ValueError(
                    f"{self.directory} was begun with another {name} than is there now: digest {str(was)[:12]}..., not "
                    f"{str(now)[:12]}...: put the old one back, or begin a new run"
                )

    def restore(self, learner: Learner) -> None:
        """Let a learner go on from the newest checkpoint that can be read; without any it starts anew.

        The policy is written anew: who was killed may have left its two files of different updates.
        """
        if not checkpoints(self.directory / CHECKPOINTS):
            return
        state = load_checkpoint(self.directory / CHECKPOINTS)
        values = dict(state.values)
        try:
            self.seconds = float(values.pop("seconds", 0.0))
            learner.restore(State(state.tensors, values))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.directory} can't go on from its checkpoint: {error}") from error
        self._save_policy(learner)

    @contextmanager
    def writing(self, done: int) -> Iterator[None]:
        """Open metrics and events for what comes after step ``done``; what is there of later steps is cut off.

        Raises
        ------
        OSError
            If the directory, or one in it, can't be written in.
        """
        path = self.directory / METRICS
        # Here, not at the first checkpoint, it shows that nothing can be written.
        for place in (CHECKPOINTS, POLICY):
            check_writable(self.directory / place)
            remove_leftovers(self.directory / place)
        # A run without a checkpoint has no step at all, not even step 0.
        started = bool(checkpoints(self.directory / CHECKPOINTS))
        kept = [line for line in read_metrics(self.directory) if started and line["step"] <= done]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        _pass_second(self.directory)
        with (
            naming(self.directory),
            _threads_quiet_of_disks(),
            path.open("a", encoding="utf-8") as self._metrics,
            SummaryWriter(str(self.directory), purge_step=done + started) as self._events,
        ):
            if not started:
                for summary in hparams(_flat(self.config["arguments"]), dict.fromkeys(SHOWN, 0.0)):
                    self._events._get_file_writer().add_summary(summary)
            yield
        self._metrics = self._events = None

    def log(self, step: int, metrics: Mapping[str, float], image: np.ndarray | None = None) -> None:
        """Write a step's metrics by tag, and a picture (height, width, 3) uint8 of what is kept."""
        if self._metrics is None or self._events is None:
            raise ValueError("the run is not being written: use `with run.writing(done)`")
        line = {"step": step, **metrics, "time/total": self.seconds}
        self._metrics.write(json.dumps(line) + "\n")
        for tag, value in line.items():
            if tag != "step":
                self._events.add_scalar(tag, value, step)
        if image is not None:
            self._events.add_image("kept", image, step, dataformats="HWC")

    def save(self, learner: Learner) -> None:
        """Write the policy and a checkpoint, after everything that was logged up to here is on disk."""
        if self._metrics is not None and self._events is not None:
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
            self._events.flush()
        self._save_policy(learner)
        state = learner.state()
        values = state.values | {"seconds": self.seconds}
        save_checkpoint(self.directory / CHECKPOINTS, State(state.tensors, values), learner.done)

    def _save_policy(self, learner: Learner) -> None:
        """Write the policy, which says what run it is of."""
        policy: Any = learner.policy
        policy.training = {**policy.training, "run": self.config}
        policy.save_pretrained(self.directory / POLICY)


@contextmanager
def _threads_quiet_of_disks() -> Iterator[None]:
    """Keep TensorBoard's thread from printing what it can't write: whoever logs next gets the same error."""
    before = threading.excepthook

    def told(failure: threading.ExceptHookArgs) -> None:
        if not (isinstance(failure.exc_value, OSError) and failure.exc_value.errno in DISK_ERRORS):
            before(failure)

    threading.excepthook = told
    try:
        yield
    finally:
        threading.excepthook = before


def _pass_second(directory: Path) -> None:
    """Wait until a new event file is read after those there: the order is that of the seconds in their names."""
    made = [path.name.split(".")[3] for path in directory.glob("events.out.tfevents.*")]
    newest = max((int(second) for second in made if second.isdecimal()), default=0)
    # At most a second: a name from the future (a clock put back) is not waited for.
    if int(time.time()) == newest:
        time.sleep(newest + 1 - time.time())


class Interruption:
    """Notes SIGINT and SIGTERM, so that what is under way can be finished and saved; a second one takes effect at once.

    Attributes
    ----------
    signal : int or None
        What came.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Interruption:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    @property
    def exit_code(self) -> int:
        """What a process that was ended by the signal exits with; 0 without one."""
        return 128 + self.signal if self.signal else 0

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def read_config(directory: Path) -> dict[str, Any]:
    """Return a run's ``config.json``.

    Raises
    ------
    ValueError
        If there is none, or it isn't one.
    """
    path = directory / CONFIG
    try:
        config = read_json(path, "the configuration of a run")
    except FileNotFoundError:
        raise ValueError(f"{directory} is no run: it has no {CONFIG}") from None
    known = isinstance(config, dict) and {"learner", "arguments", "commit"} <= set(config)
    objects = known and all(isinstance(config.get(name, {}), dict) for name in ("arguments", "made_from"))
    if not objects or not isinstance(config["learner"], str):
        raise ValueError(f"{path} is not the configuration of a run")
    return unsealed(config, path)


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write a run's ``config.json``."""
    write_atomic(directory / CONFIG, json.dumps(sealed(config), indent=2) + "\n")


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """Return the lines of ``metrics.jsonl`` but for a torn last one, which a killed run leaves.

    Raises
    ------
    ValueError
        If another line is damaged, with its number.
    """
    path = directory / METRICS
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        numbers = isinstance(line, dict) and all(type(value) in (int, float) for value in line.values())
        if not numbers or type(line.get("step")) is not int:
            raise ValueError(f"{path}:{number} is not a step's metrics: numbers by tag, and the step")
    return lines


def to_json(arguments: Any) -> dict[str, Any]:
    """Return a dataclass of arguments as JSON-able values."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(arguments), default=str))
    return values


def from_json(default: Arguments, values: Mapping[str, Any]) -> Arguments:
    """Return a dataclass with the values that :func:`to_json` made; ``default`` gives their types.

    Raises
    ------
    ValueError
        If a value's name is unknown, or it is of another type.
    """
    unknown = set(values) - {field.name for field in fields(default)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"{CONFIG} has unknown arguments {sorted(unknown)}: it is of another version of kvenv")
    hints = get_type_hints(type(default))
    read = {name: _read(getattr(default, name), value, hints[name], name) for name, value in values.items()}
    return replace(default, **read)  # type: ignore[type-var]


def _read(default: Any, value: Any, hint: Any, name: str) -> Any:
    """Return a JSON value in the type of a field."""
    if is_dataclass(default) and isinstance(value, dict):
        return from_json(default, value)
    if not fits(value, hint):
        raise ValueError(f"{CONFIG} has {name} {value!r}, where a value like {default!r} is right")
    if isinstance(default, Path):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def saved_arguments(directory: Path, default: Arguments) -> Arguments:
    """Return the arguments of a run; ``default`` gives their types.

    Raises
    ------
    ValueError
        If they are of other types, or of another version of kvenv.
    """
    config = read_config(directory)
    try:
        return from_json(default, config["arguments"])
    except ValueError as error:
        raise ValueError(f"{directory} can't be resumed: {error}") from error


def changed(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the arguments that differ, by name: (saved, given)."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in saved.keys() | given.keys():
        was, now = saved.get(name), given.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            found |= changed(was, now)
        elif was != now:
            found[name] = (was, now)
    return dict(sorted(found.items()))


def commit() -> str | None:
    """Return the commit of this checkout, with ``+changes`` where tracked files were changed; None outside of one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Installed inside somebody else's checkout, this file isn't one of its files.
        git("ls-files", "--error-unmatch", str(here))
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested arguments as TensorBoard's hyper-parameters: numbers, flags and strings."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}/")
        else:
            flat[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
