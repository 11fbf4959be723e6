"""The command line: dispatch, one-line errors with exit codes, the clash of the name `agents`, progress."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

from experiments import cli, progress

ROOT = Path(__file__).resolve().parent.parent


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["-h"], ["--help"]):
        cli.main(argv)
        lines = capsys.readouterr().out.splitlines()
        for name, line in cli.COMMANDS.items():
            assert f"  {name:<10}{line}" in lines


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: kvenv {name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["quality", "--traces", "0"], "traces 0 must be at least 1"),
        (["quality", "--lengths", "512", "5000"], "trace_length 5000 exceeds the 4096 positions of model 'tiny'"),
        (["relevance", "--traces", "0"], "traces 0 must be at least 1"),
        (["relevance", "--every", "0"], "every 0 must be from 1 to half of trace_length 512"),
        (["relevance", "--every", "257"], "every 257 must be from 1 to half of trace_length 512"),
    ],
)
def test_impossible_numbers_are_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"kvenv: error: {says}\n"


def test_an_unknown_command_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluat"])
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "unknown command 'evaluat': known are demo, evaluate" in errors[0]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("budget 3 is too small:\n  at least 8"), 2, "kvenv: error: budget 3 is too small: at least 8"),
        (FileNotFoundError(2, "No such file", "x.jsonl"), 2, "kvenv: error: [Errno 2] No such file: 'x.jsonl'"),
        (ImportError("pip install 'kvenv[datasets]'"), 2, "kvenv: error: pip install 'kvenv[datasets]'"),
        (KeyboardInterrupt(), 130, "kvenv: interrupted"),
    ],
)
def test_user_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    monkeypatch.delenv("KVENV_TRACEBACK", raising=False)

    def command(argv: Sequence[str] | None) -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        cli.run(command, [])
    assert stopped.value.code == code
    assert capsys.readouterr().err == f"{says}\n"


def test_a_bug_keeps_its_traceback() -> None:
    def command(argv: Sequence[str] | None) -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        cli.run(command, [])


def test_a_user_error_shows_its_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(argv: Sequence[str] | None) -> None:
        raise ValueError("which line?")

    monkeypatch.setenv("KVENV_TRACEBACK", "1")
    with pytest.raises(ValueError, match="which line"):
        cli.run(command, [])


@dataclass
class Args:
    """The pattern every command follows."""

    budgets: tuple[int, ...] = (32, 64)
    """Pairs kept by every (layer, KV head)."""
    trace_length: int = 512
    """Tokens of a trace."""
    full_metrics: bool = False
    """Also report the full cache."""


def test_options_have_hyphens_and_lists_are_separated_by_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    args = tyro.cli(Args, args=["--budgets", "16", "48", "96", "--trace-length", "256", "--full-metrics"])
    assert args == Args((16, 48, 96), 256, True)
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(Args, args=["--budgets", "many"], prog="kvenv try")
    assert stopped.value.code == 2


def test_a_foreign_agents_package_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("class Agent: ...\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for command in (["-m", "experiments.cli", "--help"], ["-c", "from experiments.cli import main; main(['--help'])"]):
        # From a directory of its own: `-m` puts the working directory before PYTHONPATH.
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=tmp_path.parent
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert str(tmp_path / "agents" / "__init__.py") in done.stderr


def test_progress_off_a_terminal_is_a_line_after_two_seconds_and_every_ten(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.track("abcdef", "training")) == list("abcdef")
    # Started at 0, the items begin at 4, 8, ...: the first is past two seconds, the fourth ten seconds later.
    assert capsys.readouterr().err.splitlines() == ["training: 0/6", "training: 3/6, about 16 s left"]


def test_progress_without_a_total_and_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(iter(()), "nothing")) == []
    assert list(progress.track(iter([1, 2]), "some")) == [1, 2]
    assert capsys.readouterr().err == ""
