"""Restarts of learners: built, trained, put away, dropped, and taken up again from the run directory."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from typing import Any

import agents
from agents.grpo import GRPOConfig
from agents.imitation import ImitationConfig
from agents.kvp import KVPConfig
from agents.ppo import PPOConfig
from experiments.learners import GRPO, KVP, PPO, DecodingArgs, Imitation, LearnerArgs, PaidArgs, RolloutArgs, RunArgs
from experiments.soak.environments import BUDGET, INTERVAL, LENGTH, PROTECTED, Round
from experiments.train import train

UPDATES = 2
"""Updates before a restart, and as many after it."""

CONFIGS: dict[str, Any] = {
    "imitation": ImitationConfig(num_traces=4, hidden=8, budgets=(BUDGET,)),
    "grpo": GRPOConfig(num_traces=2, group=2, hidden=8, budgets=(BUDGET,)),
    "kvp": KVPConfig(batch_size=4, samples=2, embedding=8, hidden=8),
    "ppo": PPOConfig(epochs=2, minibatches=2, hidden=8),
}
"""Small ones, by learner."""


def restart(learner: str, now: Round) -> int:
    """Train by the command's own way, evaluations included, and go on from the checkpoint; no step counts."""
    out = now.directory / f"{learner}-{now.number}"
    args = _arguments(learner, now)
    args = replace(
        args,
        learner=replace(CONFIGS[learner], updates=UPDATES),
        run=RunArgs(out=out, eval_every=UPDATES, eval_traces=2, eval_budgets=(BUDGET,), save_every=1),
    )
    train(args)
    longer = replace(args.learner, updates=2 * UPDATES)
    policy = train(replace(args, learner=longer, run=replace(args.run, resume=out)))
    agents.make(policy)
    shutil.rmtree(out)
    return 0


def _arguments(learner: str, now: Round) -> LearnerArgs:
    """Return a learner's arguments but for what is trained how long and kept where."""
    decoding: Any = {"trace_length": LENGTH, "interval": INTERVAL, "device": now.device, **PROTECTED}
    if learner == "kvp":
        return KVP(DecodingArgs(**decoding), store=now.directory / "store")
    if learner == "ppo":
        return PPO(PaidArgs(**decoding, budget=BUDGET, num_envs=2))
    return {"imitation": Imitation, "grpo": GRPO}[learner](RolloutArgs(**decoding))


RESTARTS = {name: partial(restart, name) for name in CONFIGS}
"""A restart of each learner."""
