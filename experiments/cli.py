"""``kvenv COMMAND ...``: finds the command's module, and ends every command's user errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

import kvenv
from kvenv.memory import LOWER, out_of_memory

COMMANDS = {
    "demo": "train a first agent, evaluate it beside every heuristic, show a trace",
    "evaluate": "compare policies on the same traces, or on the papers' benchmarks",
    "show": "show what a policy keeps of one trace, window by window",
    "generate": "let an LLM go on with a prompt under a budget",
    "plan": "what memory and time a training would take",
    "train": "train an agent: imitation, kvp, grpo or ppo",
    "report": "compare trainings: a table, and curves by update and by wall clock",
    "reproduce": "train, measure and judge what kvenv claims, or put a paper's figures beside ours",
    "record": "record a trace store, from which kvp learns without the LLM",
    "bench": "measure how fast kvenv is on this machine, beside what it is to be compared with",
    "pretrain": "train the bundled LLM anew",
    "quality": "print how well an LLM answers held-out traces with the full cache",
    "relevance": "print how little token identity alone tells of what will be asked",
    "soak": "run everything in one process for long, and see that it holds no more at the end",
    "headroom": "measure what there is to learn: golden, random and the heuristics on every trace family",
}

# What bad input raises, and numbers or memory that end; anything else is a bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)


def usage() -> str:
    """Return the help text of ``kvenv``, one line per command."""
    lines = [f"  {name:<10}{line}" for name, line in COMMANDS.items()]
    return "\n".join(
        ["usage: kvenv COMMAND [options]", "", "commands:", *lines, "", "`kvenv COMMAND --help` lists its options."]
    )


def fail(message: str) -> NoReturn:
    """End the process with ``message`` as one line on stderr and exit code 2."""
    print(f"kvenv: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def run(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Call ``command(argv)`` and turn what a user can cause into an exit code.

    A ValueError, OSError or ImportError, NaN and running out of memory end in one line on stderr and exit code 2,
    Ctrl-C in exit code 130. With the environment variable ``KVENV_TRACEBACK`` set the traceback is shown as well.

    Parameters
    ----------
    command : callable
        A command module's ``main``.
    argv : sequence of str, optional
        Its arguments; those of the process if None.
    """
    try:
        command(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("kvenv: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader (`kvenv show ... | head`) has enough; without this Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (*USER_ERRORS, RuntimeError) as error:
        told = isinstance(error, USER_ERRORS)
        if os.environ.get("KVENV_TRACEBACK") or not (told or out_of_memory(error)):
            raise
        fail(str(error) or type(error).__name__ if told else f"out of memory: {LOWER} ({error})")


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``kvenv``: the first argument names the command, the rest is the command's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"kvenv {kvenv.__version__}")
    elif name not in COMMANDS:
        fail(f"unknown command {name!r}: known are {', '.join(COMMANDS)}")
    else:
        run(lambda rest: import_module(f"experiments.{name}").main(rest), arguments[1:])


if __name__ == "__main__":
    main()
