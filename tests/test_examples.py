"""The examples run: outside algorithms on the environment as it is."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.environments import BUDGET, INTERVAL, LENGTH, MODEL, RAGGED, RECENT
from tests.examples import reinforce

SMALL = {
    "model": MODEL, "traces": RAGGED, "trace_length": LENGTH, "budget": BUDGET, "interval": INTERVAL, "recent": RECENT,
    "num_envs": 2, "updates": 2,
}  # fmt: skip


def test_reinforce_in_one_file(tmp_path: Path) -> None:
    returns = reinforce.main(reinforce.Args(**SMALL, log=str(tmp_path)))
    assert len(returns) == 2
    assert np.isfinite(returns).all()
    assert returns == reinforce.main(reinforce.Args(**SMALL)), "not reproducible"
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_torchrls_ppo(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchrl", reason="TorchRL isn't installed: pip install 'kvenv[torchrl]'")
    from tests.examples import torchrl_ppo

    rewards = torchrl_ppo.main(torchrl_ppo.Args(**SMALL, steps=7, epochs=1))
    assert len(rewards) == 2
    assert np.isfinite(rewards).all()
    # Before the first gradient step the actions are as likely as when they were taken.
    kl = [float(number) for number in re.findall(r"KL (\S+)", capsys.readouterr().out)]
    assert kl == pytest.approx([0.0, 0.0], abs=1e-4)
