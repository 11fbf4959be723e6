"""What more GPUs would reach: plain arithmetic on what was measured; the committed page is made of committed rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import cli, scaleout
from experiments.scaleout import RESULTS, Args, Update

UPDATE = Update(parts=32, part=10.0, nbytes=1e6, call=0.01, step=0.5, rate=1e8, gpus=8)


def test_an_update_takes_its_parts_in_turn_and_what_the_learner_does_alone() -> None:
    # 32 parts on 5 workers are 7 rounds; one node is sent 1 MB, and 32 MB come back, at 100 MB/s.
    taken = UPDATE.seconds(5)
    assert taken == pytest.approx({"parts": 70, "step": 0.5, "weights": 0.01, "gradients": 0.32, "calls": 0.32})
    assert UPDATE.seconds(32)["weights"] == pytest.approx(0.04), "four nodes"
    assert UPDATE.seconds(64) == UPDATE.seconds(32), "more workers than parts change nothing"


def test_efficiency_is_beside_as_many_times_one_worker() -> None:
    assert UPDATE.efficiency(1) == 1
    free = replace(UPDATE, nbytes=0, call=0, step=0)
    assert free.efficiency(32) == pytest.approx(1)
    assert free.efficiency(64) == pytest.approx(0.5)
    assert free.efficiency(31) == pytest.approx(32 / 2 / 31)
    assert UPDATE.efficiency(32) < free.efficiency(32)


def test_where_half_of_an_update_is_the_learners_alone() -> None:
    alone = sum(UPDATE.seconds(32).values()) - UPDATE.part
    at = round(UPDATE.part / alone * UPDATE.parts)
    assert f"half of an update at {at:,} of them" in " ".join(scaleout.saturation(UPDATE))


def test_the_committed_page_is_made_of_the_committed_rows(tmp_path: Path) -> None:
    scaleout.main(["--out", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == (RESULTS / "scaleout.md").read_text()
    measured = json.loads((RESULTS / "bench.json").read_text())["sections"]["scaleout"]["rows"]
    assert any(row["metric"] == "efficiency of 2 workers" for row in measured)


def test_faster_gpus_leave_more_to_the_learner(tmp_path: Path) -> None:
    rows = json.loads(Args().bench.read_text())["sections"]["scaleout"]["rows"]
    measured = {row["metric"]: row["value"] for row in rows if row["case"].startswith(("grpo", "messages"))}
    measured["gradients"] = 8 * measured["gradient of a part"]
    slow, fast = (scaleout.planned(Args(tflops=tflops), measured, 32) for tflops in (100.0, 1000.0))
    assert slow.part == pytest.approx(10 * fast.part)
    assert slow.efficiency(32) > fast.efficiency(32)


@pytest.mark.parametrize("content", [None, '{"sections": {}}'])
def test_without_rows_it_says_what_to_run(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "bench.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        cli.run(scaleout.main, ["--bench", str(tmp_path / "bench.json"), "--out", str(tmp_path / "page.md")])
    assert stopped.value.code == 2
    assert "run `kvenv bench scaleout` first" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
