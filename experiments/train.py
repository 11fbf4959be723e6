"""``python -m experiments.train LEARNER``: train an agent in a run directory, resumable at any moment."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import tyro

from agents.checkpoint import checkpoints
from agents.learner import Learner, SharedLearner
from experiments.cli import run as run_command
from experiments.crew import CrewArgs
from experiments.learners import LEARNERS, LearnerArgs, PresetName, SharedArgs, default_arguments
from experiments.progress import track
from experiments.replicas import Replicas
from experiments.runs import (
    CHECKPOINTS,
    CONFIG,
    POLICY,
    Interruption,
    Run,
    changed,
    read_config,
    saved_arguments,
    to_json,
    write_config,
)
from experiments.validation import Validation, means
from kvenv.determinism import set_deterministic
from kvenv.lock import hold

CREW = tuple(field.name for field in fields(CrewArgs))
"""Arguments that say who does the work, which changes no result."""


def parse(arguments: Sequence[str]) -> LearnerArgs:
    """Return the arguments of a learner, those of a resumed run taken from its directory where none are given.

    Raises
    ------
    ValueError
        If the directory is no run, or one of another learner.
    """
    name, *rest = arguments
    prog = f"kvenv train {name}"
    resume = _option(rest, "--resume")
    if resume is None:
        preset = _option(rest, "--preset") or "none"
        # An unknown preset is tyro's to refuse.
        known: Any = preset if preset in get_args(PresetName) else "none"
        return tyro.cli(LEARNERS[name], args=rest, default=default_arguments(name, known), prog=prog)
    config, out = read_config(Path(resume)), _option(rest, "--out")
    if config["learner"] != name:
        raise ValueError(f"--resume {resume}: that is a run of {config['learner']}, not of {name}")
    if out is not None and Path(out).resolve() != Path(resume).resolve():
        raise ValueError(f"--out {out}: the run has its directory, {resume}, and goes on there")
    saved = saved_arguments(Path(resume), default_arguments(name))
    return tyro.cli(LEARNERS[name], args=rest, default=saved, prog=prog)


def train(args: LearnerArgs, part_of: Path | None = None) -> Path:
    """Train in a run directory, or go on in one, and return the directory of the saved policy.

    Parameters
    ----------
    args : LearnerArgs
        Who learns what from what.
    part_of : Path, optional
        The run of which this is the first stage, and by which it is resumed.

    Raises
    ------
    ValueError
        If an argument is impossible, another process trains there, or a resumed run is given other arguments than more
        updates, another LLM or other data.
    FloatingPointError, MemoryError, ChildProcessError
        If a number is NaN, memory runs out or workers die again and again; the message says what there is to go on
        from.
    SystemExit
        With the code of a signal that came (130 or 143), after a checkpoint.
    """
    _check(args)
    if args.env.deterministic:
        set_deterministic()
    with hold(args.run.resume or args.run.out):
        return _train(args, part_of)


def _train(args: LearnerArgs, part_of: Path | None) -> Path:
    """Train, see :func:`train`, in a directory in which nobody else writes."""
    if args.run.resume is not None:
        _refuse_changes(args)
    elif isinstance(args, SharedArgs) and args.crew.ray is not None:
        args = args.divided()
    first = args.first_stage(args.run.resume or args.run.out)
    begun = args.run.resume is not None and bool(checkpoints(args.run.resume / CHECKPOINTS))
    started = args.after(first.run.out / POLICY) if first is not None and begun else args
    args.verify()
    # Both are made before the directory is: they find what is impossible.
    learner, validation = started.build(), args.validation() if args.run.eval_every else None
    made_from = args.made_from(learner)
    run = Run.create(args.run.out, args.name, args, made_from) if args.run.resume is None else Run(args.run.resume)
    if args.run.resume is not None:
        run.check_made_from(made_from)
        run.restore(learner)
        _extend(run, args.learner.updates, learner.done)
    if first is not None and not begun:
        started = args.after(train_whole(first, run.directory))
        learner = started.build()
    with (
        Interruption() as interruption,
        _team(started, learner) as team,
        run.writing(learner.done),
        _telling_what_is_saved(run, part_of),
    ):
        if learner.done == 0 and validation:
            run.log(0, *_validate(validation, learner, team))
        for _ in track(range(learner.done, args.learner.updates), args.name):
            if _advance(run, learner, validation, args, interruption, team):
                directory = part_of or run.directory
                print(
                    f"{args.name}: {learner.done} updates are saved, go on with --resume {directory}", file=sys.stderr
                )
                raise SystemExit(interruption.exit_code)
    return run.directory / POLICY


def train_whole(args: LearnerArgs, part_of: Path | None = None) -> Path:
    """Train, or go on where a training with these arguments was interrupted; see :func:`train`."""
    begun = (args.run.out / CONFIG).exists()
    return train(replace(args, run=replace(args.run, resume=args.run.out)) if begun else args, part_of)


@contextmanager
def _team(args: LearnerArgs, learner: Learner) -> Iterator[Replicas | None]:
    """Give the learner replicas on a cluster, if it is to have some."""
    if not (isinstance(args, SharedArgs) and isinstance(learner, SharedLearner) and args.crew.ray is not None):
        yield None
        return
    if learner.parts < args.crew.workers:
        print(f"{args.name}: an update has {learner.parts} parts, too few for all workers", file=sys.stderr)
    with closing(Replicas(args, learner)) as team:
        yield team


def _advance(
    run: Run,
    learner: Learner,
    validation: Validation | None,
    args: LearnerArgs,
    interruption: Interruption,
    team: Replicas | None,
) -> bool:
    """Make one update, and what falls due after it; return whether a signal asks to stop, all being saved."""
    began = time.perf_counter()
    metrics, image = team.update() if team else learner.update(), None
    _check_metrics(learner, metrics)
    run.seconds += time.perf_counter() - began
    last = learner.done >= args.learner.updates
    if validation and (last or learner.done % args.run.eval_every == 0):
        measured, image = _validate(validation, learner, team)
        metrics |= measured
    run.log(learner.done, metrics, image)
    # Read once: a signal that comes later is answered after the next update, which is then saved.
    stop = interruption.signal is not None
    if last or stop or learner.done % args.run.save_every == 0:
        run.save(learner)
    return stop


def _check_metrics(learner: Learner, metrics: Mapping[str, float]) -> None:
    """Refuse an update of which a number is none, its gradient's norm among them."""
    if lost := [tag for tag, value in metrics.items() if not math.isfinite(value)]:
        traces = ", ".join(repr(name) for name in dict.fromkeys(learner.learnt_from))
        raise FloatingPointError(f"update {learner.done} gives NaN or infinity in {', '.join(lost)}, traces {traces}")


@contextmanager
def _telling_what_is_saved(run: Run, part_of: Path | None) -> Iterator[None]:
    """Let errors that end a training say what there is to go on from."""
    try:
        yield
    except (FloatingPointError, MemoryError, ChildProcessError) as error:
        kind = next(kind for kind in (FloatingPointError, MemoryError, ChildProcessError) if isinstance(error, kind))
        saved, resume = checkpoints(run.directory / CHECKPOINTS), f"--resume {part_of or run.directory}"
        there = f"goes on from update {int(saved[-1].name)}" if saved else "begins anew, nothing was saved"
        raise kind(f"{error}; {resume} {there}") from error


def _validate(validation: Validation, learner: Learner, team: Replicas | None) -> tuple[dict[str, float], np.ndarray]:
    """Return what validation traces say of the policy, and a picture of what it keeps."""
    policy = learner.policy
    measured = means(team.measure(validation)) if team else validation.measure(policy)
    return measured, validation.picture(policy)


def _check(args: LearnerArgs) -> None:
    """Refuse numbers that can't be."""
    if isinstance(args, SharedArgs) and args.crew.ray is not None:
        args.crew.connect()
    for value, name, least in (
        (args.learner.updates, "updates", 1),
        (args.run.eval_every, "eval-every", 0),
        (args.run.eval_traces, "eval-traces", 1),
        (args.run.save_every, "save-every", 1),
    ):
        if value < least:
            raise ValueError(f"--{name} {value} is impossible: it must be at least {least}")


def _refuse_changes(args: LearnerArgs) -> None:
    """Refuse to go on with other arguments than a run was begun with."""
    if args.run.resume is None:
        return
    saved = saved_arguments(args.run.resume, default_arguments(args.name))
    for argument, (was, now) in changed(to_json(saved), to_json(args)).items():
        # The directory may have moved since, or be spelled otherwise; who does the work changes nothing.
        if argument not in ("resume", "out", "updates", *CREW):
            option = argument.replace("_", "-")
            raise ValueError(f"--{option} {now}: the run has {was}, and a resumed run keeps its arguments")


def _extend(run: Run, updates: int, done: int) -> None:
    """Note that a finished run is to make more updates; refuse any other change of their number."""
    planned = run.config["arguments"]["learner"]["updates"]
    if updates == planned:
        return
    if done < planned:
        raise ValueError(
            f"--updates {updates}: the run has made {done} of its {planned} updates; finish it, then extend it"
        )
    if updates < planned:
        raise ValueError(f"--updates {updates}: the run has made {done} already")
    run.config["arguments"]["learner"]["updates"] = updates
    write_config(run.directory, run.config)


def _option(arguments: Sequence[str], name: str) -> str | None:
    """Return an option's value, where it is given."""
    for number, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
        if argument == name and number + 1 < len(arguments):
            return arguments[number + 1]
    return None


def main(argv: Sequence[str] | None = None) -> None:
    """Train the agent that the first argument names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    resume = _option(arguments, "--resume")
    if resume is not None and arguments[0] not in LEARNERS:
        arguments.insert(0, str(read_config(Path(resume))["learner"]))
    if not arguments or arguments[0] not in LEARNERS:
        kinds: dict[str, Any] = LEARNERS
        tyro.extras.subcommand_cli_from_dict(kinds, args=arguments, prog="kvenv train")  # help, or what is wrong
    args = parse(arguments)
    print(f"policy: {train(args)}")


if __name__ == "__main__":
    run_command(main)
