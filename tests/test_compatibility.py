"""What the compatibility matrix is made of, and that README's is the one that was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pytest

from experiments import compatibility
from experiments.compatibility import ROWS, counts, dependencies, installed, lowest, not_as_asked, said
from experiments.compatibility_outcomes import LIBRARIES, WITHOUT, Outcome, merged, read, table, text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results" / "compatibility.json"
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "gymnasium": "1.2.0", "transformers": "5.4.0"}
GOOD = Outcome("lowest", VERSIONS, {"passed": 1234, "failed": 0, "skipped": 5}, date="2026-01-02", commit="abc")

REPORT = """<?xml version="1.0"?><testsuites><testsuite tests="4">
<testcase classname="tests.test_a" name="test_x"/>
<testcase classname="tests.test_a" name="test_y[1]"><failure message="no">why</failure></testcase>
<testcase classname="tests.test_a" name="test_z"><skipped message="later"/></testcase>
<testcase classname="tests.test_b" name="test_setup"><error message="no">why</error></testcase>
</testsuite></testsuites>"""


def test_rows_pin_the_bounds_of_pyproject() -> None:
    from packaging.requirements import Requirement

    bounds = dependencies()
    assert set(LIBRARIES) < set(bounds)
    assert all(Requirement(f"{name}>={bound}") for name, bound in bounds.items())
    assert lowest("newest") == {}
    assert lowest("lowest") == {name: bounds[name] for name in LIBRARIES}
    for library in LIBRARIES:
        assert lowest(f"lowest-{library}") == {library: bounds[library]}
    assert lowest("lowest-everything") == {name: bound for name, bound in bounds.items() if name != "torch"}


def test_the_tests_that_rows_run_are_there() -> None:
    for name in (*compatibility.TESTS, *compatibility.LIGHT_TESTS):
        assert (ROOT / "tests" / f"test_{name}.py").is_file(), name


def test_every_dependency_has_a_lower_bound_that_is_read() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.partition("\ndependencies = [\n")[2].partition("\n]")[0]
    assert len(dependencies()) == len(block.splitlines())


def test_tests_are_counted_and_those_that_failed_are_named() -> None:
    tests, failures = counts(REPORT)
    assert tests == {"passed": 1, "failed": 2, "skipped": 1}
    assert failures == ["tests.test_a::test_y[1]", "tests.test_b::test_setup"]


def test_what_is_installed_is_asked_of_another_python() -> None:
    assert installed(sys.executable, "gymnasium")["gymnasium"] == version("gymnasium")
    with pytest.raises(OSError, match=r"PackageNotFoundError: .*no-such-package"):
        installed(sys.executable, "no-such-package")
    with pytest.raises(OSError, match="failed"):
        said(sys.executable, "-c", "raise SystemExit(3)")


def test_a_row_with_other_versions_than_its_own_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = dependencies()
    asked = {**{name: f"{bounds[name]}.0" for name in LIBRARIES}, "gymnasium": "9.9"}
    assert not_as_asked("lowest-transformers", asked, "python") == ""
    assert not_as_asked("lowest-gymnasium", asked, "python") == f"gymnasium is 9.9, not {bounds['gymnasium']}"
    monkeypatch.setattr(compatibility, "said", lambda *command: f"{command[-1]} (9.9)\nAvailable versions: 9.9, 1.0")
    told = not_as_asked("newest", asked, "python")
    assert "gymnasium" not in told
    assert f"transformers is {asked['transformers']}, not 9.9" in told


def test_a_new_outcome_replaces_that_of_its_row_and_python(tmp_path: Path) -> None:
    other = replace(GOOD, versions={**VERSIONS, "python": "3.14.1"})
    without = replace(GOOD, row=WITHOUT, versions={**VERSIONS, "python": "3.10.2"})
    first = replace(GOOD, row=next(iter(ROWS)))
    outcomes: list[Outcome] = []
    for outcome in (without, other, GOOD, first):
        outcomes = merged(outcomes, outcome)
    assert outcomes == [first, GOOD, other, without]
    again = replace(GOOD, versions={**VERSIONS, "python": "3.11.9"}, error="pip failed")
    assert merged(outcomes, again) == [first, again, other, without]
    path = tmp_path / "outcomes.json"
    assert read(path) == []
    path.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    assert read(path) == outcomes


def test_tables_say_what_happened() -> None:
    failed = replace(GOOD, row="newest", tests={"passed": 1, "failed": 1, "skipped": 0}, failures=["tests.a::b"])
    broken = replace(GOOD, row="lowest-gymnasium", tests={}, error="pip failed")
    without = replace(GOOD, row=WITHOUT, checks={"files": 7, "modules": 5, "stopped": 2, "ids": ["KVRank-v0"]})
    assert GOOD.good
    assert not failed.good
    assert not broken.good
    shown = table([failed, GOOD, broken, without])
    assert "| 3.11.7 | 2.13.0 | 1.2.0 | 5.4.0 |  | `lowest` | 1,234 | 0 | 5 |" in shown
    assert "not run: pip failed" in shown
    assert "| 7 | 5 | 2 | KVRank-v0 | 1,234 |" in shown
    assert len({line.count("|") for line in table([failed, GOOD, broken]).splitlines()}) == 1
    assert "  failed: tests.a::b" in text([failed])


def test_rows_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="--rows oldest: known are newest, lowest"):
        compatibility.main(["--rows", "oldest"])


def test_a_failed_row_is_written_and_ends_the_command_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_venv(*_: object, **__: object) -> str:
        raise OSError("it can't be made")

    monkeypatch.setattr(compatibility, "make_venv", no_venv)
    monkeypatch.setattr(compatibility, "VENVS", tmp_path)
    out = tmp_path / "outcomes.json"
    with pytest.raises(SystemExit, match="1"):
        compatibility.main(["--rows", "newest", "--out", str(out)])
    assert [outcome.error for outcome in read(out)] == ["it can't be made"]
    assert "not run: it can't be made" in out.with_suffix(".txt").read_text()


# What is None there can't be imported, as if it weren't installed.
WITHOUT_PYTORCH = """
import runpy, sys
sys.modules |= {"torch": None, "stable_baselines3": None}
runpy.run_path("experiments/compatibility_peer.py", run_name="__main__")
"""


def test_without_pytorch_files_compile_modules_stop_there_and_ids_are_known() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_PYTORCH], check=True, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(done.stdout)
    files = [file for package in ("kvenv", "agents", "experiments") for file in (ROOT / package).rglob("*.py")]
    assert found["files"] == len(files)
    assert found["modules"] + found["stopped"] == len(files) - 3  # the packages themselves are imported, not walked
    assert min(found["modules"], found["stopped"]) > 30
    assert found["ids"] == ["KVEvict-v0", "KVRank-v0"]


def test_readme_shows_what_was_measured() -> None:
    outcomes = read(RESULTS)
    assert {outcome.row for outcome in outcomes} >= {*ROWS, WITHOUT}
    assert RESULTS.with_suffix(".txt").read_text(encoding="utf-8") == text(outcomes)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for without in (False, True):
        assert table([outcome for outcome in outcomes if (outcome.row == WITHOUT) == without]) in readme


def test_what_was_measured_at_the_lowest_is_what_pyproject_allows() -> None:
    measured = [outcome for outcome in read(RESULTS) if outcome.row in list(ROWS)[1:] and not outcome.error]
    assert measured
    assert [not_as_asked(outcome.row, outcome.versions, "") for outcome in measured] == [""] * len(measured)
