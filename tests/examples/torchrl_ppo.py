"""TorchRL's own PPO on KVEvict-v0, one row per (trace, layer, KV head); needs ``pip install "kvenv[torchrl]"``.

    python -m tests.examples.torchrl_ppo --updates 50 --num-envs 8

The package lends a scorer with weights for every head; all that TorchRL must be told of rankings is a distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
import tyro
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs import GymWrapper
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import kvenv
from agents.scorer import Scorer
from kvenv import plackett_luce
from kvenv.ranking import action_from_order, eviction_order, order_from_action


@dataclass
class Args:
    """TorchRL's PPO on KVEvict-v0."""

    updates: int = 50
    """Rollouts to learn from."""
    num_envs: int = 8
    """Traces decoded side by side."""
    model: str = "tiny"
    """The LLM."""
    traces: str = "recall"
    """A trace family."""
    trace_length: int = 512
    """Tokens of a trace."""
    budget: int = 32
    """Pairs each (layer, KV head) keeps."""
    interval: int = 16
    """Tokens decoded between two evictions."""
    recent: int = 16
    """Newest tokens that are never evicted."""
    steps: int = 30
    """Decisions of every row in a rollout."""
    epochs: int = 4
    """Gradient steps on a rollout."""
    learning_rate: float = 1e-3
    """Adam's step size."""
    seed: int = 0
    """Seed of everything."""


class Evictions(torch.distributions.Distribution):
    """Plackett-Luce over the pairs that go, acting by ranks."""

    def __init__(self, scores: Tensor, positions: Tensor, mask: Tensor, picks: int) -> None:
        super().__init__(scores.shape[:-1], scores.shape[-1:], validate_args=False)
        self.scores, self.positions, self.mask, self.picks = scores, positions, mask.bool(), picks

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Return the ranks (..., C) of a sampled order."""
        noise = torch.rand_like(self.scores).clamp(min=1e-30)
        return action_from_order(plackett_luce.sample(-self.scores, self.positions, self.mask, noise), self.mask)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability (...) of the evictions that an action makes."""
        return self._over_picks(plackett_luce.log_prob, value)

    def entropy(self) -> Tensor:
        """Return an estimate (...) of the entropy, along one sample."""
        return self._over_picks(plackett_luce.entropy, self.sample())

    @property
    def deterministic_sample(self) -> Tensor:
        """Return the ranks (..., C) of the scores."""
        return action_from_order(eviction_order(self.scores, self.positions, self.mask), self.mask)

    def _over_picks(self, of_picks: Any, action: Tensor) -> Tensor:
        order = order_from_action(action, self.positions, self.mask)
        count = torch.full(order.shape[:-1], self.picks)
        return of_picks(-self.scores, order, self.mask, count, self.picks).sum(dim=-1)


class Actor(nn.Module):
    """Scores (..., C) of a row's pairs; layer and head come one-hot from TorchRL."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, features: Tensor, layer: Tensor, head: Tensor) -> Tensor:
        """Return higher = keep."""
        at = (layer.argmax(dim=-1).flatten(), head.argmax(dim=-1).flatten())
        return self.scorer(features.flatten(0, -3), at).view(features.shape[:-1])


class Critic(nn.Module):
    """The value (..., 1) of a row's state: mean features of its pairs, and how far the trace is."""

    def __init__(self, width: int, trace_length: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width + 1, 64), nn.Tanh(), nn.Linear(64, 1))
        self.trace_length = trace_length

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Return the value."""
        progress = positions.amax(dim=-1, keepdim=True) / self.trace_length
        return self.net(torch.cat([features.mean(dim=-2), progress], dim=-1))


def main(args: Args) -> list[float]:
    """Train and return the mean reward of every rollout."""
    torch.manual_seed(args.seed)
    vec: Any = gym.make_vec(
        "KVEvict-v0",
        num_envs=args.num_envs,
        model=args.model,
        traces=args.traces,
        trace_length=args.trace_length,
        budget=args.budget,
        interval=args.interval,
        recent=args.recent,
        features="stats",
        reward="lm_loss_increase",
        autoreset_mode="Disabled",  # TorchRL resets the rows that ended itself
    )
    heads = kvenv.HeadView(vec)
    env = GymWrapper(heads)
    env.set_seed(args.seed)
    width = vec.feature_shape[3]
    scorer = Scorer(heads.layers, heads.heads, width, hidden=32)
    actor = ProbabilisticActor(
        TensorDictModule(Actor(scorer), in_keys=["features", "layer", "head"], out_keys=["scores"]),
        in_keys=["scores", "positions", "mask"],
        out_keys=["action"],
        distribution_class=Evictions,
        distribution_kwargs={"picks": args.interval},
        return_log_prob=True,
    )
    critic = TensorDictModule(
        Critic(width, args.trace_length), in_keys=["features", "positions"], out_keys=["state_value"]
    )
    advantage = GAE(gamma=0.95, lmbda=0.95, value_network=critic, average_gae=True)
    objective = ClipPPOLoss(actor, critic, entropy_bonus=False)
    optimizer = torch.optim.Adam(objective.parameters(), lr=args.learning_rate)
    rewards = []
    for update in range(args.updates):
        with torch.no_grad():
            rollout = env.rollout(args.steps, actor, break_when_any_done=False)
        for _ in range(args.epochs):
            advantage(rollout)
            losses = objective(rollout.reshape(-1))
            optimizer.zero_grad()
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
            optimizer.step()
        rewards.append(float(rollout["next", "reward"].mean()))
        print(f"update {update}: reward {rewards[-1]:.4f}, KL {float(losses['kl_approx']):.4f}")
    env.close()
    return rewards


if __name__ == "__main__":
    main(tyro.cli(Args))
