"""What Stable-Baselines3 needs to rank: an actor and a critic whose action is the order in which a head's pairs go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from agents.scorer import Scorer, ScorerPolicy
from kvenv import plackett_luce
from kvenv.ranking import action_from_order, eviction_order, order_from_action

Rows = Any
"""A dict of tensors (B, ...), the observations of :func:`agents.make_sb3_env`; SB3's annotations allow more."""


class EvictionDistribution:
    """Plackett-Luce over the evicted prefix of rankings, acting in the environment's Box.

    Parameters
    ----------
    scores : Tensor (B, C)
        Higher means keep.
    positions, mask : Tensor (B, C)
        From the observation.
    count : Tensor (B,)
        Pairs that are evicted.
    """

    def __init__(self, scores: Tensor, positions: Tensor, mask: Tensor, count: Tensor) -> None:
        self.scores, self.positions, self.mask, self.count = scores, positions.long(), mask.bool(), count.long()

    def get_actions(self, deterministic: bool = False) -> Tensor:
        """Return :meth:`mode` or :meth:`sample`; SB3's name."""
        return self.mode() if deterministic else self.sample()

    def sample(self) -> Tensor:
        """Return actions (B, C), the ranks of a sampled order."""
        # rand may be 0, whose logarithm isn't finite.
        noise = torch.rand_like(self.scores).clamp(min=torch.finfo(self.scores.dtype).tiny)
        order = plackett_luce.sample(-self.scores, self.positions, self.mask, noise)
        return action_from_order(order, self.mask)

    def mode(self) -> Tensor:
        """Return actions (B, C), the ranks of the scores."""
        return action_from_order(eviction_order(self.scores, self.positions, self.mask), self.mask)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the exact log-probability (B,), in nats, of the prefix that the environment executes."""
        return self._over_picks(plackett_luce.log_prob, actions)

    def entropy(self, actions: Tensor) -> Tensor:
        """Return an estimate of the prefix's entropy (B,) in nats: exact at each pick, along the actions' order.

        Unbiased if the actions were sampled from this distribution.
        """
        return self._over_picks(plackett_luce.entropy, actions)

    def _over_picks(self, of_picks: Callable[..., Tensor], actions: Tensor) -> Tensor:
        """Sum a function of :mod:`kvenv.plackett_luce` over the picks that actions make."""
        order = order_from_action(actions, self.positions, self.mask)
        return of_picks(-self.scores, order, self.mask, self.count, actions.shape[-1]).sum(dim=-1)


class KVRankingPolicy(ActorCriticPolicy):
    """SB3's actor and critic for :func:`agents.make_sb3_env`: ranks a head's cached pairs and values its state.

    The actor is a :class:`agents.scorer.Scorer` with weights of its own for every (layer, KV head); an action is the
    rank of every candidate, which survives SB3's clipping and its float32 buffer exactly. What has a probability is the
    order of the ``count`` pairs that go. The critic sees mean and maximum of the features over the head's pairs.

    ``model.save`` and ``PPO.load`` are SB3's format, a zip that holds pickles: load trusted files only.
    ``model.policy.ranking_policy("stats").save_pretrained(directory)`` writes what :func:`agents.make` reads, without
    pickles.

    Parameters
    ----------
    observation_space, action_space, lr_schedule
        Given by SB3.
    hidden : int
        Hidden units of the scorer and of the critic.
    **kwargs
        Those of ``ActorCriticPolicy``; network architectures don't apply.

    Raises
    ------
    ValueError
        If the observations are others.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        hidden: int = 64,
        **kwargs: Any,
    ) -> None:
        wanted = {"features", "positions", "mask", "layer", "head", "count"}
        if not isinstance(observation_space, spaces.Dict) or not wanted <= set(observation_space.spaces):
            raise ValueError(f"KVRankingPolicy needs the observations of agents.make_sb3_env, not {observation_space}")
        if kwargs.get("use_sde"):
            raise ValueError("use_sde=True perturbs Gaussians: KVRankingPolicy samples rankings, leave it out")
        self.hidden = hidden
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def forward(self, obs: Rows, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return actions (B, C), values (B, 1) and log-probabilities (B,)."""
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def evaluate_actions(self, obs: Rows, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values (B, 1), the log-probabilities (B,) of what the actions evicted, and entropies (B,)."""
        distribution = self.get_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy(actions)

    def get_distribution(self, obs: Rows) -> EvictionDistribution:  # type: ignore[override]
        """Return the distribution of evictions."""
        scores = self.scorer(obs["features"], self._heads(obs))
        return EvictionDistribution(scores, obs["positions"], obs["mask"], obs["count"].reshape(-1))

    def predict_values(self, obs: Rows) -> Tensor:
        """Return values (B, 1)."""
        (layer, head), (layers, heads, *_) = self._heads(obs), self.scorer.shape
        filled = (obs["positions"] >= 0)[..., None]
        squashed = torch.asinh(obs["features"]) * filled
        mean = squashed.sum(dim=1) / filled.sum(dim=1).clamp(min=1)
        progress = obs["positions"].amax(dim=1, keepdim=True) / self.trace_length
        identity = nn.functional.one_hot(layer * heads + head, layers * heads)
        return self.critic(torch.cat([mean, squashed.amax(dim=1), progress, identity], dim=1))

    def calibrate(self, observation: dict[str, Any]) -> None:
        """Set the scorer's input constants from an observation of all rows, as ``env.reset()`` returns it."""
        layers, heads, *_ = self.scorer.shape
        features, positions = (torch.as_tensor(observation[name]) for name in ("features", "positions"))
        by_head = (features.shape[0] // (layers * heads), layers, heads)
        self.scorer.calibrate(
            features.view(*by_head, *features.shape[1:]).to(self.device),
            positions.view(*by_head, -1).to(self.device) >= 0,
        )

    def start_from(self, policy: ScorerPolicy, temperature: float = 1.0) -> None:
        """Take over the scorer of a policy that was trained otherwise, e.g. by imitation.

        Parameters
        ----------
        policy : ScorerPolicy
            For the same model and features, with as many hidden units.
        temperature : float
            What its scores are divided by: the smaller, the closer sampled rankings are to the policy's own.

        Raises
        ------
        ValueError
            If it is of another shape.
        """
        if policy.scorer.shape != self.scorer.shape:
            raise ValueError(
                f"policy {policy.name!r} has a scorer of layers, heads, features, hidden units and depth "
                f"{policy.scorer.shape}: this one's are {self.scorer.shape}"
            )
        self.scorer.load_state_dict(policy.scorer.state_dict())
        with torch.no_grad():
            self.scorer.last.div_(temperature)

    def ranking_policy(self, features: str, name: str = "ppo", **about: Any) -> ScorerPolicy:
        """Return a copy of the actor as a policy for rollouts and evaluation, which saves without pickles.

        Parameters
        ----------
        features : str
            Name of the feature set of the environment.
        name : str
            What tables call it.
        **about
            The other arguments of :class:`agents.scorer.ScorerPolicy`: how it was made, and for which LLM.
        """
        return ScorerPolicy(copy.deepcopy(self.scorer), features, name, **about)

    def _heads(self, obs: Rows) -> tuple[Tensor, Tensor]:
        """Return layer and head of every row (B,)."""
        return obs["layer"].long().reshape(-1), obs["head"].long().reshape(-1)

    def _build(self, lr_schedule: Schedule) -> None:
        """Make the networks and the optimizer; SB3 calls it."""
        space = cast(Any, self.observation_space)
        layers, heads = int(space["layer"].n), int(space["head"].n)
        width = space["features"].shape[1]
        self.trace_length = int(space["positions"].high.max()) + 1
        self.scorer = Scorer(layers, heads, width, self.hidden)
        with torch.no_grad():
            self.scorer.last.mul_(0.01)  # as SB3's own policies: the first rankings are nearly uniform
        inputs = 2 * width + 1 + layers * heads
        self.critic = nn.Sequential(nn.Linear(inputs, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 1))
        make = cast(Callable[..., torch.optim.Optimizer], self.optimizer_class)
        self.optimizer = make(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """Return what SB3 saves to make this policy anew."""
        return super()._get_constructor_parameters() | {"hidden": self.hidden}
