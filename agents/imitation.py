"""Imitation of Golden Eviction: pairwise ranking along golden trajectories (ForesightKV, arXiv 2602.03203, stage 1).

At every decision the environment is stepped by the expert; the scorer learns to rank the cached pairs as golden does.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from agents.base import needed
from agents.scorer import Scorer, ScorerPolicy
from kvenv.ranking import action_from_order, eviction_order
from kvenv.vector_env import KVEvictVectorEnv


@dataclass(frozen=True)
class ImitationConfig:
    """Hyper-parameters of imitation."""

    updates: int = 500
    """Gradient steps; each takes one decision of every row."""
    learning_rate: float = 1e-2
    """Adam's step size after the warm-up; falls to a tenth by a cosine."""
    warmup: int = 10
    """Updates of linear warm-up."""
    margin: float = 0.1
    """How much higher the better of two pairs must score (0.01 in the paper's code)."""
    weighted: bool = True
    """Weight pairs by how much their order matters; the paper counts all alike."""
    hidden: int = 64
    """Hidden units of the scorer (16 in the paper's code)."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 0
    """Seed of the initial weights and of the traces."""


def pairwise_hinge(scores: Tensor, utility: Tensor, mask: Tensor, margin: float, weighted: bool = True) -> Tensor:
    """Return the pairwise ranking hinge loss.

    Weighted, a pair counts by the difference of the square roots of its two utilities: the order among pairs that
    nobody will look at decides nothing, and unweighted they are nearly all there is.

    Parameters
    ----------
    scores, utility : Tensor (..., C)
        The scorer's output and golden's utility.
    mask : Tensor (..., C) bool
        Candidates.
    margin : float
        How much higher the better of two pairs must score.
    weighted : bool
        Whether pairs count by how much their order matters.

    Returns
    -------
    Tensor ()
        Mean over the ordered pairs of candidates with different utilities.
    """
    root = utility.to(scores.dtype).clamp(min=0).sqrt()
    weight = (root[..., :, None] - root[..., None, :]).clamp(min=0)
    weight = weight * (mask[..., :, None] & mask[..., None, :])
    if not weighted:
        weight = (weight > 0).to(scores.dtype)
    short = (margin - (scores[..., :, None] - scores[..., None, :])).clamp(min=0)
    return (weight * short).sum() / weight.sum().clamp(min=1e-8)


class ImitationLearner:
    """Trains a scorer to rank cached pairs as Golden Eviction does.

    Parameters
    ----------
    env : KVEvictVectorEnv
        With ``output="torch"`` and ``autoreset_mode="SameStep"``: every step is a decision of every row. Its feature
        set is what the scorer sees.
    config : ImitationConfig, optional
        Hyper-parameters.

    Raises
    ------
    ValueError
        If the environment is set up otherwise.
    """

    def __init__(self, env: KVEvictVectorEnv, config: ImitationConfig | None = None) -> None:
        if env.output != "torch" or env.autoreset_mode != "SameStep":
            raise ValueError(
                "imitation needs an environment with output='torch' and autoreset_mode='SameStep', "
                f"not {env.output!r} and {env.autoreset_mode!r}"
            )
        self.env, self.config = env, config or ImitationConfig()
        torch.manual_seed(self.config.seed)
        self.observation, _ = env.reset(seed=self.config.seed)
        features = self.observation["features"]
        _, layers, heads, _, width = features.shape
        self.scorer = Scorer(layers, heads, width, self.config.hidden).to(features.device)
        self.scorer.calibrate(features, self.observation["positions"] >= 0)
        self.optimizer = torch.optim.Adam(self.scorer.parameters(), lr=self.config.learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    @property
    def policy(self) -> ScorerPolicy:
        """The policy as trained so far."""
        training = {"learner": "imitation", **asdict(self.config)}
        return ScorerPolicy(self.scorer, self.env.features, "imitation", training)

    def update(self) -> dict[str, float]:
        """Learn from one decision of every row, let golden take it, and return the metrics."""
        began = time.perf_counter()
        utility = torch.stack([needed(state, "future") for state in self.env.layer_states(needs={"future"})], dim=1)
        mask, positions = self.observation["mask"].bool(), self.observation["positions"]
        action = action_from_order(eviction_order(utility, positions, mask), mask)
        acted = time.perf_counter()
        scores = self.scorer(self.observation["features"])
        loss = pairwise_hinge(scores, utility, mask, self.config.margin, self.config.weighted)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.scorer.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.schedule.step()
        learnt = time.perf_counter()
        self.observation, reward, *_ = self.env.step(action)
        return {
            "loss/ranking": float(loss.detach()),
            "loss/grad_norm": float(norm),
            "rollout/reward": float(reward.mean()),
            "time/policy": acted - began,
            "time/learn": learnt - acted,
            "time/env": time.perf_counter() - learnt,
        }

    def _rate(self, update: int) -> float:
        """Factor on the learning rate: linear warm-up, then a cosine down to a tenth."""
        warmup, updates = self.config.warmup, self.config.updates
        if update < warmup:
            return (update + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (update - warmup) / max(1, updates - warmup))
