"""Jobs are done once, in order, in processes of their own, and end with whoever started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.jobs import Job, read_times, run_jobs

ROOT = Path(__file__).resolve().parent.parent


def note(log: Path, name: str, result: Path) -> None:
    """Append a line to a log, and be done."""
    with log.open("a") as file:
        file.write(f"{name} {os.getpid()}\n")
    result.write_text("")


def fails(result: Path) -> None:
    """Fail as a training does that was given nonsense."""
    raise ValueError(f"no {result.name}")


def sleeps(result: Path) -> None:
    """Say who runs, then be busy for a minute."""
    result.with_suffix(".pid").write_text(str(os.getpid()))
    time.sleep(60)


def noted(tmp_path: Path, name: str, *after: str) -> Job:
    """Return a job that notes its name."""
    return Job(name, note, (tmp_path / "log", name, tmp_path / name), tmp_path / name, after)


def test_jobs_wait_for_others_and_what_is_done_stays_done(tmp_path: Path) -> None:
    jobs = [noted(tmp_path, "late", "early"), noted(tmp_path, "early"), noted(tmp_path, "there")]
    (tmp_path / "there").write_text("")
    for _ in range(2):
        run_jobs(jobs, 2, tmp_path / "times.json")
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [name for name, _ in lines] == ["early", "late"]
    assert len({process for _, process in lines} | {str(os.getpid())}) == 3, "jobs shared a process"
    assert set(read_times(tmp_path / "times.json")) == {"early", "late"}


def test_a_failing_job_ends_all_and_a_second_call_goes_on(tmp_path: Path) -> None:
    bad = Job("bad", fails, (tmp_path / "bad",), tmp_path / "bad")
    with pytest.raises(ValueError, match="no bad"):
        run_jobs([noted(tmp_path, "one"), bad, noted(tmp_path, "two", "bad")], 1, tmp_path / "times.json")
    assert (tmp_path / "one").exists()
    assert not (tmp_path / "two").exists()
    run_jobs([noted(tmp_path, "one"), noted(tmp_path, "two")], 1, tmp_path / "times.json")
    assert (tmp_path / "two").exists()
    assert set(json.loads((tmp_path / "times.json").read_text())) == {"one", "bad", "two"}


def test_what_can_never_begin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jobs a, b come after"):
        run_jobs([noted(tmp_path, "a", "b"), noted(tmp_path, "b", "a")], 1, tmp_path / "times.json")
    with pytest.raises(ValueError, match="processes 0 is impossible"):
        run_jobs([noted(tmp_path, "a")], 0, tmp_path / "times.json")


def alive(process: int) -> bool:
    """Return whether a process runs."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_jobs_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from experiments.jobs import Job, run_jobs; from tests.test_jobs import sleeps\n"
        f"out = Path({str(tmp_path / 'long')!r})\n"
        "run_jobs([Job('long', sleeps, (out,), out)], 1, out.with_suffix('.json'))"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    written = tmp_path / "long.pid"
    while not written.exists() or not written.read_text():
        assert starter.poll() is None
        time.sleep(0.05)
    worker = int(written.read_text())
    assert alive(worker)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    deadline = time.monotonic() + 20
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)
