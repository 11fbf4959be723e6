"""``python -m experiments.train imitation``: train an agent through the environment and save its policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro
from torch.utils.tensorboard import SummaryWriter

from agents.imitation import ImitationConfig, ImitationLearner
from experiments.cli import run
from experiments.progress import track
from kvenv.files import write_atomic
from kvenv.vector_env import KVEvictVectorEnv


@dataclass(frozen=True)
class EnvironmentArgs:
    """Where the agent trains; names and defaults are those of KVEvict-v0."""

    model: str = "tiny"
    """The LLM: tiny, a directory, a hub id or a registered name."""
    traces: str = "recall+tracking+dialogue+reasoning"
    """A trace family, several joined by +, a file or a registered name."""
    trace_length: int = 512
    """Tokens of a trace."""
    budget: int = 64
    """Pairs each (layer, KV head) keeps after an eviction."""
    interval: int = 16
    """Tokens decoded between two evictions."""
    sinks: int = 4
    """First tokens that are never evicted."""
    recent: int = 16
    """Newest tokens that are never evicted."""
    features: str = "foresight"
    """What the policy sees: kv, foresight, stats or a registered name."""
    num_envs: int = 16
    """Traces decoded side by side."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: str = "float32"
    """Data type of the LLM."""

    def make(self) -> KVEvictVectorEnv:
        """Return the training environment: on tensors, every step a decision of every row."""
        return KVEvictVectorEnv(**asdict(self), split="train", output="torch", autoreset_mode="SameStep")


@dataclass(frozen=True)
class Imitation:
    """Imitate Golden Eviction by a pairwise ranking loss along golden trajectories (ForesightKV, stage 1)."""

    env: tyro.conf.OmitArgPrefixes[EnvironmentArgs] = field(default_factory=EnvironmentArgs)
    learner: tyro.conf.OmitArgPrefixes[ImitationConfig] = field(default_factory=ImitationConfig)
    out: Path = Path("runs/imitation")
    """Directory of the run: config.json, policy/, TensorBoard events."""


def train_imitation(args: Imitation) -> Path:
    """Train by imitation and return the directory of the saved policy."""
    env = args.env.make()
    config = {"env": asdict(args.env), "learner": asdict(args.learner)}
    write_atomic(args.out / "config.json", json.dumps(config, indent=2) + "\n")
    learner = ImitationLearner(env, args.learner)
    with SummaryWriter(str(args.out)) as writer:
        for update in track(range(args.learner.updates), "imitation"):
            for tag, value in learner.update().items():
                writer.add_scalar(tag, value, update)
    env.close()
    policy = learner.policy
    policy.training |= {"env": config["env"]}
    policy.save(args.out / "policy")
    return args.out / "policy"


def main(argv: Sequence[str] | None = None) -> None:
    """Train the agent that the first argument names."""
    args = tyro.extras.subcommand_cli_from_dict({"imitation": Imitation}, args=argv, prog="kvenv train")
    print(f"policy: {train_imitation(args)}")


if __name__ == "__main__":
    run(main)
