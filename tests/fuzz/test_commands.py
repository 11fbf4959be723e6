"""Whatever is typed, a command ends with 0, 2 or 130, and 2 is one line, or the box in which tyro says what is wrong.

What would take long is interrupted, as by Ctrl-C; counts are never large, so that hardly anything is.
"""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st

from experiments import cli
from experiments.learners import default_arguments
from experiments.runs import Run
from tests.fuzz.counted import fuzz
from tests.test_grpo import learner

PATIENCE = 20.0
"""Seconds until a command is interrupted, and once more, should it finish something first."""

TINY = "--trace-length 48 --interval 4 --recent 4"
LEARNING = f"{TINY} --updates 1 --num-traces 1 --hidden 4 --eval-every 0"
BASES = {
    "evaluate": f"--policies random h2o --traces recall --budgets 8 16 --num-traces 1 {TINY} --out e",
    "show": f"h2o --traces recall --trace 1 --budget 16 {TINY}",
    "generate": "code --policy h2o --budget 16 --interval 4 --max-new-tokens 3 --temperature 0.5 --top-p 0.9",
    "plan": "grpo --model tiny --updates 3",
    "train imitation": f"imitation {LEARNING} --budgets 8 --out t",
    "train grpo": f"grpo {LEARNING} --budgets 8 --group 2 --epochs 1 --temperature 0.5 --out g",
    "train ppo": f"ppo {LEARNING} --budget 8 --num-envs 2 --out p",
    "train kvp": "kvp --store store --updates 1 --batch 1 --eval-every 0 --out k",
    "train --resume": "--resume run --updates 2",
    "report": "run --out r",
    "record": "--traces recall --num-traces 2 --trace-length 48 --interval 8 --batch-size 1 --out s",
    "quality": "--lengths 48 64 --traces 1 --split test",
    "relevance": "--traces 8 --trace-length 128 --every 16",
    "headroom": f"--traces recall --num-traces 1 --seeds 0 --no-expected {TINY} --out h",
    "demo": "--updates 1 1 --traces recall --num-traces 1 --budgets 8 --out d",
    "pretrain": "--layers 1 --hidden 8 --final-steps 1 --out n",
    "bench": "step --out b",
    "reproduce": "claims --out c",
}
"""What works, by command and, where it has several, kind."""

MINUTES = ("demo", "pretrain", "bench", "reproduce")
"""Those that can't be made small, or start processes: they are always told something that nobody knows, too."""

NUMBERS = ["-1", "0", "1", "2", "7", "17", "40", "-0.5", "0.5", "1e3", "1e400", "nan", "inf", "1_0"]
HUGE = ["100000000", "9" * 19, "9" * 30]
COUNTS = (
    "--updates",
    "--num-traces",
    "--traces",
    "--max-new-tokens",
    "--epochs",
    "--group",
    "--batch",
    "--final-steps",
)
"""Options that any number is possible for, if one has the time."""
WORDS = [
    "", " ", "x", "-", "--", "-h", "--help", "None", "true", "[]", "é", "\0", "\udcff", "tiny", "recall", "golden",
    "full", "h2o", "kvp-tiny", "a.txt", "a.jsonl", "run", "run/policy", "../x", "nobody/nothing", "x" * 5000, "kv",
    "lm_loss", "periodic", "prefill", "float64", "meta", "cuda", "--out", "--model", "--traces", "--budgets", "--seed",
    "--seeds", "--nonsense", "--policies", "--features", "--dtype", "--device", "--schedule", "--resume", "--preset",
]  # fmt: skip


def options(kind: str) -> dict[str, str]:
    """Return the options of what works, and what they take, as the help tells them."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        cli.main([*kind.replace("--resume", "grpo").split(), "--help"])
    return dict(re.findall(r"(--[a-z][a-z-]+) ([^ \n]+)", shown.getvalue()))


@st.composite
def typed(draw: st.DrawFn, kind: str, known: dict[str, str]) -> list[str]:
    """Return what works with something replaced, dropped, doubled, or put in, up to three times."""
    words = BASES[kind].split()
    numbers = [place for place, word in enumerate(words) if word.replace(".", "").isdigit()]
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from([*["number", "option"] * 4, "replace", "drop", "insert", "double"]))
        place = draw(st.integers(0, len(words) - 1))
        if how == "number" and numbers:
            place = draw(st.sampled_from(numbers))
            words[place] = draw(_number(words[place - 1]))
        elif how == "option" and known:
            option = draw(st.sampled_from(sorted(known)))
            words += [option, draw(_number(option) if known[option] in ("INT", "FLOAT") else st.sampled_from(WORDS))]
        elif how == "drop":
            words[place] = ""
        else:
            other = draw(st.sampled_from(NUMBERS) | st.sampled_from(WORDS) | st.text(max_size=3))
            words[place : place + (how == "replace")] = [words[place] if how == "double" else other]
    return words


def _number(option: str) -> st.SearchStrategy[str]:
    """Return what may be typed for a number after an option."""
    return st.sampled_from(NUMBERS if option in COUNTS else [*NUMBERS, *HUGE])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, rank_store: str) -> Iterator[Path]:
    """Work in a directory that holds a run, a store and traces."""
    directory = tmp_path_factory.mktemp("outer") / "inner"
    (directory / "empty").mkdir(parents=True)
    run, learning = Run.create(directory / "run", "grpo", default_arguments("grpo")), learner()
    with run.writing(0):
        run.log(0, {"eval/answer_loss": 2.0})
        run.save(learning)
    (directory / "store").symlink_to(rank_store)
    (directory / "a.txt").write_text("the code is seven . " * 60)
    (directory / "a.jsonl").write_text('{"input_ids": [5, 6, 7]}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield directory


@contextlib.contextmanager
def interrupted_at_last() -> Iterator[None]:
    """Press Ctrl-C when patience is at an end, and again."""
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ended(argv: list[str]) -> tuple[int, str]:
    """Run a command and return its exit code and what it wrote to stderr."""
    errors, code = io.StringIO(), 0
    with (
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        pytest.MonkeyPatch.context() as patch,
        interrupted_at_last(),
    ):
        warnings.simplefilter("ignore")
        patch.setattr(sys, "stdin", io.StringIO("the code"))
        try:
            cli.main(argv)
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1 if stopped.code else 0
    return code, errors.getvalue()


@pytest.mark.parametrize("kind", BASES)
def test_commands_end_with_a_word(place: Path, kind: str) -> None:
    name = kind.split()[0]

    @fuzz(5, words=typed(kind, options(kind)))
    def check(words: list[str]) -> None:
        code, errors = ended([name, *words, *(["--nonsense"] if name in MINUTES else [])])
        assert code in (0, 2, 130)
        # Frames are tyro's, where there is no terminal; plan has a parser of its own.
        if code == 2 and "\n -----" not in errors and "usage: kvenv plan" not in errors:
            told = errors.split("kvenv: error: ")
            assert len(told) == 2
            assert told[1].count("\n") == 1

    check()


@fuzz(30, words=st.lists(st.sampled_from([*WORDS, *BASES]) | st.text(max_size=5), max_size=4))
def test_what_is_no_command_is_one_line(place: Path, words: list[str]) -> None:
    if words and words[0] in cli.COMMANDS:
        words = [f"{words[0]}x", *words[1:]]
    code, errors = ended(words)
    assert code in (0, 2)
    assert len(errors.splitlines()) == (code == 2)
