"""REINFORCE on KVEvict-v0, CleanRL style: one file, read top to bottom, that knows the environment and its rankings.

    python -m tests.examples.reinforce --updates 100 --num-envs 16

All rows decode the same trace; a row is credited with what it did better than the others from a window on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import kvenv  # noqa: F401  registers the environments
from kvenv import plackett_luce
from kvenv.ranking import action_from_order


@dataclass
class Args:
    """REINFORCE on KVEvict-v0."""

    updates: int = 100
    """Episodes to learn from, one after the other."""
    num_envs: int = 16
    """Rollouts of a trace that are compared with each other."""
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
    learning_rate: float = 1e-2
    """Adam's step size."""
    hidden: int = 32
    """Hidden units of the scorer."""
    seed: int = 0
    """Seed of everything."""
    device: str = "cpu"
    """cpu or cuda; nothing is copied between the two while it runs."""
    log: str = ""
    """TensorBoard directory; none if empty."""


class Scorer(nn.Module):
    """Evict logits of cached pairs, one small network per (layer, KV head)."""

    def __init__(self, layers: int, heads: int, width: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(layers, heads, width, hidden) * width**-0.5)
        self.second = nn.Parameter(torch.randn(layers, heads, hidden, 1) * 0.1 * hidden**-0.5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (N, L, H, C) of features (N, L, H, C, F); higher goes sooner."""
        return (torch.tanh(features @ self.first) @ self.second).squeeze(-1)


def main(args: Args) -> list[float]:
    """Train and return the mean return of every update."""
    torch.manual_seed(args.seed)
    envs = gym.make_vec(
        "KVEvict-v0",
        num_envs=args.num_envs,
        model=args.model,
        traces=args.traces,
        trace_length=args.trace_length,
        budget=args.budget,
        interval=args.interval,
        recent=args.recent,
        features="stats",
        output="torch",
        autoreset_mode="Disabled",
        device=args.device,
    )
    layers, heads, _, width = envs.unwrapped.feature_shape
    scorer = Scorer(layers, heads, width, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(scorer.parameters(), lr=args.learning_rate)
    writer = SummaryWriter(args.log) if args.log else None
    returns = []
    for update in range(args.updates):
        began = time.perf_counter()
        observation, _ = envs.reset(seed=args.seed, options={"trace": update})
        log_probs, rewards, terminated = [], [], torch.zeros(1, dtype=torch.bool)
        while not terminated.all():
            logits, mask = scorer(observation["features"]), observation["mask"].bool()
            noise = torch.rand_like(logits).clamp(min=1e-30)
            order = plackett_luce.sample(logits.detach(), observation["positions"], mask, noise)
            count = (observation["positions"] >= 0).sum(dim=-1) - args.budget
            # One factor per pick; the product over a whole model would be a number that nothing can be learnt from.
            picks = plackett_luce.log_prob(logits, order, mask, count, args.interval)
            log_probs.append(picks.mean(dim=(1, 2, 3)))
            observation, reward, terminated, *_ = envs.step(action_from_order(order, mask))
            rewards.append(reward)
        to_go = torch.stack(rewards).flip(0).cumsum(0).flip(0)
        advantage = (to_go - to_go.mean(dim=1, keepdim=True)) / (to_go.std(dim=1, keepdim=True) + 1e-8)
        loss = -(advantage * torch.stack(log_probs)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        returns.append(float(to_go[0].mean()))
        if writer:
            writer.add_scalar("rollout/ep_rew_mean", returns[-1], update)
            writer.add_scalar("time/update", time.perf_counter() - began, update)
        print(f"update {update}: return {returns[-1]:.3f}, {time.perf_counter() - began:.2f} s")
    envs.close()
    return returns


if __name__ == "__main__":
    main(tyro.cli(Args))
