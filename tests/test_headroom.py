"""What counts as headroom, on made-up losses, and the command from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import agents
import kvenv.lookahead
from experiments import headroom
from experiments.comparison import Comparison
from tests.test_comparison import rows


def comparison(family: str = "recall", **losses: float) -> Comparison:
    """Return a comparison of policies with constant answer losses; underscores stand for hyphens."""
    return Comparison(rows({name.replace("_", "-"): np.full((3, 2), x) for name, x in losses.items()}, traces=family))


GOOD = {"full": 0.1, "golden": 0.35, "golden_expected": 0.4, "random": 1.4, "h2o": 0.9, "keydiff": 0.75}


@pytest.mark.parametrize(
    ("change", "met"),
    [
        ({}, [True, True, True, True]),
        ({"random": 1.3}, [False, True, True, True]),
        ({"golden": 0.42, "random": 1.5}, [True, False, True, True]),
        ({"h2o": 0.6}, [True, True, False, False]),
        ({"keydiff": 0.68}, [True, True, True, False]),
    ],
)
def test_requirements_are_those_of_the_issue(change: dict[str, float], met: list[bool]) -> None:
    found = headroom.requirements(comparison(**GOOD | change), "recall", 32)
    assert [requirement.met for requirement in found] == met
    losses = GOOD | change
    assert found[0].difference.mean == pytest.approx(losses["random"] - losses["golden"])


def test_without_golden_expected_there_are_three() -> None:
    losses = {name: loss for name, loss in GOOD.items() if name != "golden_expected"}
    assert len(headroom.requirements(comparison(**losses), "recall", 32)) == 3


def test_the_best_heuristic_must_be_far_off_on_three_families_only() -> None:
    saturated = GOOD | {"h2o": 0.36}
    families = [comparison(name, **losses) for name, losses in zip("abcd", (GOOD, GOOD, GOOD, saturated), strict=True)]
    found = [r for c in families for r in headroom.requirements(c, c.families[0], 32)]
    assert set(headroom.verdicts(found).values()) == {True}
    assert len(headroom.verdicts(found)) == 4
    harmless = comparison("e", **GOOD | {"random": 0.9})
    assert headroom.verdicts([*found, *headroom.requirements(harmless, "e", 32)])["random − golden ≥ 1.0"] is False
    fewer = [r for r in found if r.family in "acd"]
    assert headroom.verdicts(fewer)["best heuristic − golden > 0.3"] is False


def test_the_command_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvenv.lookahead, "CONTINUATIONS", 2)
    size = ["--trace-length", "160", "--interval", "16", "--num-traces", "2", "--seeds", "0"]
    headroom.main(["--traces", "tracking", *size, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "headroom.json").read_text())
    assert report["budget"] == 20
    assert report["arguments"]["split"] == "validation"
    assert len(report["requirements"]) == len(report["overall"]) == 4
    assert set(report["seconds_per_trace"]) == {"others", "golden-expected"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["policy"] for row in results} == {"full", *agents.names(trained=False)}
    out = capsys.readouterr().out
    assert "best heuristic − golden > 0.3 on at least 3 families: missed" in out
