"""The examples run: outside algorithms on the environment as it is."""

from __future__ import annotations

import numpy as np
import pytest

from tests.environments import BUDGET, INTERVAL, LENGTH, MODEL, RAGGED, RECENT
from tests.examples import reinforce

SMALL = {
    "model": MODEL, "traces": RAGGED, "trace_length": LENGTH, "budget": BUDGET, "interval": INTERVAL, "recent": RECENT,
    "num_envs": 2, "updates": 2,
}  # fmt: skip


def test_reinforce_in_one_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    returns = reinforce.main(reinforce.Args(**SMALL, log=str(tmp_path)))
    assert len(returns) == 2
    assert np.isfinite(returns).all()
    assert returns == reinforce.main(reinforce.Args(**SMALL)), "not reproducible"
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_torchrls_ppo() -> None:
    pytest.importorskip("torchrl", reason="TorchRL isn't installed: pip install 'kvenv[torchrl]'")
    from tests.examples import torchrl_ppo

    rewards = torchrl_ppo.main(torchrl_ppo.Args(**SMALL, steps=7))
    assert len(rewards) == 2
    assert np.isfinite(rewards).all()
