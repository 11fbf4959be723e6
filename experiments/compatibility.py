"""``python -m experiments.compatibility``: does kvenv pass its tests with other versions of what it stands on?

A row is a set of versions, installed into a virtual environment of its own that is made anew under
``runs/compatibility``, with this process's version of PyTorch; a fixed part of the tests runs there.
``--interpreters`` tries other Pythons, for which there is no PyTorch at hand: installing, compiling, importing,
registration, and the tests that need none. What was found is merged into ``--out``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

from experiments.cli import run
from experiments.compatibility_outcomes import EVERYTHING, LIBRARIES, ROWS, WITHOUT, Outcome, merged, read, table, text
from experiments.progress import track
from experiments.venvs import make_venv
from kvenv.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / "runs" / "compatibility"

TOOLS = ("pip>=23.3", "pytest", "pytest-xdist", "hypothesis")
"""What tests need besides; older pips download what they only resolve."""
TESTS = (
    "env", "env_errors", "vector_env", "rank_env", "head_view", "models", "attention", "cache", "rollout", "generation",
    "golden", "store", "answering", "ppo", "grpo", "kvp", "train", "cli", "registry", "packaging", "policy_files",
    "trained",
)  # fmt: skip
"""What runs in every row: all that touches those libraries."""
LIGHT_TESTS = ("files", "jobs", "ruler", "task_texts", "zeroshot")
"""What needs no PyTorch, but the tools of tasks, and jinja2, which PyTorch brings."""
LIGHT_TOOLS = ("jinja2", "math-verify>=0.8", "rouge>=1.0", "wonderwords>=3.0")
NEED_PYTORCH = ("torch", "stable-baselines3")

INSTALLED = """
import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))
"""


@dataclass
class Args:
    """Run a part of the tests with the lowest and the newest versions of what kvenv stands on."""

    rows: tuple[str, ...] = tuple(ROWS)
    """Which versions."""
    interpreters: tuple[str, ...] = ()
    """Pythons to be tried without PyTorch, instead of the rows."""
    system_packages: bool = False
    """Take PyTorch from the packages that this Python sees anyway, as a distribution's."""
    out: Path = Path("experiments/results/compatibility.json")
    """Where what was found is merged in; a table goes beside it."""


def dependencies() -> dict[str, str]:
    """Return what kvenv asks for, by name, each with its lower bound."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    # tomllib is new in Python 3.11; the list is plain enough for a regular expression.
    block = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[0]
    return dict(re.findall(r'^    "([\w-]+)>=([\d.]+)"', block, re.MULTILINE))


def lowest(row: str) -> dict[str, str]:
    """Return the versions that a row pins, by name."""
    bounds = dependencies()
    names = [name for name in bounds if name != "torch"] if row == EVERYTHING else ROWS[row]
    return {name: bounds[name] for name in names}


def pytorch() -> str:
    """Return the requirement of this process's PyTorch, without which pip would choose the newest CUDA build."""
    return f"torch=={version('torch').split('+')[0]}"


def said(*command: str) -> str:
    """Return what a command prints.

    Raises
    ------
    OSError
        If it fails, with its last line.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode:
        raise OSError(f"{' '.join(command[:5])} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return done.stdout


def installed(python: str, *names: str) -> dict[str, str]:
    """Return the versions of a Python and of packages that it has."""
    versions: dict[str, str] = json.loads(said(python, "-I", "-c", INSTALLED, *names))
    return versions


def not_as_asked(row: str, versions: dict[str, str], python: str) -> str:
    """Return which version isn't what the row is for; nothing if all are."""
    wanted = lowest(row)
    if row == "newest":
        listed = {name: said(python, "-m", "pip", "index", "versions", name) for name in LIBRARIES}
        wanted = {name: lines.split("(")[1].split(")")[0] for name, lines in listed.items()}
    wrong = [name for name in wanted if _short(versions[name]) != _short(wanted[name])]
    return ", ".join(f"{name} is {versions[name]}, not {wanted[name]}" for name in wrong)


def _short(version: str) -> str:
    """Return a version without the zeros at its end: 1.2 is 1.2.0."""
    return re.sub(r"(\.0)+$", "", version)


def counts(report: str) -> tuple[dict[str, int], list[str]]:
    """Return how many tests passed, failed and were skipped, and which failed, from pytest's JUnit report."""
    results: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.fromstring(report).iter("testcase"):
        tags = {child.tag for child in case}
        result = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        results[result].append(f"{case.get('classname')}::{case.get('name')}")
    return {result: len(names) for result, names in results.items()}, sorted(results["failed"])


def tested(python: str, directory: Path, names: Sequence[str], *options: str) -> tuple[dict[str, int], list[str]]:
    """Run test files in this checkout with another Python, and return :func:`counts`."""
    report, log = directory / "report.xml", directory / "pytest.log"
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in names]
    command = [python, "-m", "pytest", "-m", "not slow", "-n", "2", "--dist=loadfile", "-p", "no:cacheprovider"]
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(
            [*command, f"--junit-xml={report}", *options, *files],
            cwd=ROOT, env=_environment(), stdout=output, stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    # Failed tests are counted; anything else means that they weren't run.
    if code not in (0, 1):
        raise OSError(f"pytest ended with {code}: {log}")
    return counts(report.read_text(encoding="utf-8"))


def _environment() -> dict[str, str]:
    """Return what processes are started with: no other checkout, no network, the same random examples."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "true"}


def fresh(name: str) -> Path:
    """Return where a row's virtual environment goes, with nothing there."""
    directory = VENVS / name
    shutil.rmtree(directory, ignore_errors=True)
    return directory


def try_row(row: str, system_packages: bool) -> Outcome:
    """Install a row's versions beside this Python, and run the tests with them."""
    versions = installed(sys.executable)
    try:
        directory = fresh(f"{versions['python']}-{row}")
        pins = [f"{name}=={bound}" for name, bound in lowest(row).items()]
        requirements = [*TOOLS, pytorch(), "--editable", str(ROOT), *pins]
        python = make_venv(directory, requirements, system_packages=system_packages)
        versions = installed(python, "torch", *dict.fromkeys((*LIBRARIES, *lowest(row))))
        if wrong := not_as_asked(row, versions, python):
            return Outcome(row, versions, error=wrong)
        return Outcome(row, versions, *tested(python, directory, TESTS))
    except OSError as error:
        return Outcome(row, versions, error=str(error))


def try_without(interpreter: str) -> Outcome:
    """Install kvenv with a Python that has no PyTorch, and do what can be done there."""
    versions = installed(interpreter)
    try:
        directory = fresh(f"{versions['python']}-{WITHOUT}")
        needed = [f"{name}>={bound}" for name, bound in dependencies().items() if name not in NEED_PYTORCH]
        python = make_venv(directory, [*TOOLS, *LIGHT_TOOLS, *needed], base=interpreter)
        said(python, "-m", "pip", "install", "--quiet", "--no-deps", str(ROOT))
        versions |= resolved(python)
        checks = json.loads(said(python, "-I", str(ROOT / "experiments" / "compatibility_peer.py")))
        tests, failures = tested(python, directory, LIGHT_TESTS, "--noconftest")
        return Outcome(WITHOUT, versions, tests, failures, checks)
    except OSError as error:
        return Outcome(WITHOUT, versions, error=str(error))


def resolved(python: str) -> dict[str, str]:
    """Return which versions pip would install there with all that kvenv asks for; nothing but metadata is fetched."""
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    chosen = json.loads(said(*command, pytorch(), str(ROOT)))["install"]
    versions = {each["metadata"]["name"].lower().replace("_", "-"): each["metadata"]["version"] for each in chosen}
    return {name: versions[name] for name in ("torch", *LIBRARIES)}


def tried(args: Args) -> Iterator[Outcome]:
    """Try what was asked for."""
    if args.interpreters:
        yield from map(try_without, track(args.interpreters, "interpreters"))
    else:
        for row in track(args.rows, "rows"):
            yield try_row(row, args.system_packages)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; the exit code is 1 if anything went wrong."""
    args = tyro.cli(Args, args=argv, prog="python -m experiments.compatibility")
    if unknown := set(args.rows) - set(ROWS):
        raise ValueError(f"--rows {' '.join(sorted(unknown))}: known are {', '.join(ROWS)}")
    new = []
    for outcome in tried(args):
        new.append(outcome)
        outcomes = merged(read(args.out), outcome)
        write_atomic(args.out, json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
        write_atomic(args.out.with_suffix(".txt"), text(outcomes))
    print(table(new))
    if not all(outcome.good for outcome in new):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
