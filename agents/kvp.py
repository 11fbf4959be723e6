"""KVP: learn offline to rank cached pairs by the attention of the future (arXiv 2602.10238).

REINFORCE with a leave-one-out baseline on KVRank-v0, the agents of a layer as one batched network, layers one after the
other or side by side: rankings are drawn from the Plackett-Luce model by Gumbel-sort, the most useful pair first, and
paid minus their oracle-normalised cost over all budgets. Batches come straight from the trace store; no environment and
no LLM is run.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from agents.checkpoint import module_state, optimizer_state, restore_module, restore_optimizer
from agents.kvp_scorer import KVPPolicy, KVPScorer
from agents.learner import Share, SharedLearner, State, check_numbers, total
from agents.ranking_losses import expected_cost, pairwise_hinge, regression
from agents.schedule import follow, warm_cosine
from agents.soft_rank import soft_rank_loss
from kvenv import noise, plackett_luce
from kvenv.memory import side_by_side
from kvenv.rank_env import cost, least_cost
from kvenv.recording import RecordedTrace
from kvenv.store import TraceStore

Objective = Literal["reinforce", "cost", "regression", "pairwise", "soft-rank"]

TOLD: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cost": expected_cost,
    "regression": regression,
    "pairwise": lambda scores, utility, mask: pairwise_hinge(scores, utility, mask, margin=0.1, weighted=False),
    "soft-rank": soft_rank_loss,
}
"""Objectives that are told the utilities, as functions of (scores, utility, mask)."""


@dataclass(frozen=True)
class KVPConfig:
    """Hyper-parameters of KVP."""

    updates: int = 500
    """Gradient steps."""
    objective: Objective = "reinforce"
    """What is learnt from: what drawn rankings are paid (the paper); or from the utilities, as a supervised loss: the
    cost of drawn rankings in expectation, regression of logarithms, the order of pairs, or soft ranks, which the
    paper found to fail."""
    batch_size: int = 8
    """Recorded traces in an update, each with a cut of its own."""
    samples: int = 8
    """K, rankings drawn of each."""
    group: Literal["trace", "batch"] = "trace"
    """What a ranking is compared with: the others of its trace, or all others of the batch (the authors' code)."""
    credit: Literal["ranking", "budget"] = "budget"
    """What a pick is paid for: its whole ranking (the paper), or only the budgets that it still decides."""
    power: float = 3.0
    """Power that utilities are taken to first: what may once be all that counts shall not lose to what is always seen a
    bit (1 in the paper)."""
    learning_rate: float = 2e-3
    """AdamW's step size after the warm-up; falls to a fiftieth by a cosine."""
    warmup: int = 50
    """Updates of linear warm-up, from a hundredth."""
    weight_decay: float = 1e-3
    """AdamW's weight decay."""
    grad_clip: float = 5.0
    """Largest norm of the gradient of each (layer, KV head)."""
    ema: float = 0.99
    """Decay of the running mean of the weights, which is the policy."""
    embedding: int = 32
    """Width of the projections of key and value."""
    hidden: int = 64
    """Units of the two hidden layers."""
    seed: int = 0
    """Seed of the initial weights, the batches and the rankings."""


PRESETS = {
    "kvp": KVPConfig(
        updates=4000,
        batch_size=128,
        samples=1,
        group="batch",
        credit="ranking",
        power=1.0,
        learning_rate=5e-5,
        warmup=100,
        embedding=256,
        hidden=256,
    ),
}
"""Published hyper-parameters, from the authors' code; its utilities are sums, `kvenv record --utility sum`."""


@dataclass(frozen=True)
class Cuts:
    """A batch of cuts in one layer. N traces, H KV heads, C the largest cut, M the sum of all cuts.

    Attributes
    ----------
    layer : int
        Which.
    chosen : list of (int, int)
        Index of each trace in the store, and its cut.
    keys, values : Tensor (1, 1, H, M, D)
        The pairs of all cuts, one cut after the other: no slot is empty.
    positions, ages : Tensor (M,) int64
        Where they are.
    utility : Tensor (1, H, N, C)
        What they are worth, to the power of the configuration; 0 beyond a cut.
    slots : Tensor (N, C) int64
        Which of the M pairs each is.
    mask : Tensor (N, C) bool
        False beyond a cut.
    """

    layer: int
    chosen: list[tuple[int, int]]
    keys: Tensor
    values: Tensor
    positions: Tensor
    ages: Tensor
    utility: Tensor
    slots: Tensor
    mask: Tensor


def returns(ranked: Tensor, least: Tensor, credit: str) -> Tensor:
    """Return what the picks of rankings are paid.

    Parameters
    ----------
    ranked : Tensor (..., C)
        Utilities in ranked order, most useful first.
    least : Tensor (...)
        Cost of the best ranking.
    credit : {"ranking", "budget"}
        Whether a pick is paid for its whole ranking, or only for the budgets that it still decides.

    Returns
    -------
    Tensor (..., C), or (..., 1) where all picks of a ranking are paid alike
        The reward, or what of it depends on the pick: given the picks before, both have the same gradient.
    """
    if credit == "ranking":
        return (-cost(ranked) / least)[..., None]
    # What a budget b leaves out, for b = 1 ... C: the pick of rank r decides the budgets from r on.
    left = (ranked.sum(dim=-1, keepdim=True) - ranked.cumsum(dim=-1)).clamp(min=0)
    return -left.flip(-1).cumsum(dim=-1).flip(-1) / least[..., None]


def leave_one_out(paid: Tensor, group: str) -> Tensor:
    """Return what picks (K, L, H, N, ...) were paid beyond the mean of the others (RLOO, arXiv 2402.14740).

    The others are the same picks of the other K - 1 rankings of the trace (group ``trace``), or of all other rankings
    in the batch of N traces (``batch``).
    """
    axes = (0,) if group == "trace" else (0, 3)
    count = math.prod(paid.shape[axis] for axis in axes)
    return (paid * count - paid.sum(dim=axes, keepdim=True)) / (count - 1)


class KVPLearner(SharedLearner):
    """Trains a scorer to rank the pairs of recorded traces.

    Parameters
    ----------
    store : sequence of RecordedTrace
        :class:`kvenv.store.TraceStore`, or traces recorded in memory.
    config : KVPConfig, optional
        Hyper-parameters.
    device : str
        Where to learn.

    Raises
    ------
    ValueError
        If a hyper-parameter is impossible.
    """

    name = "kvp"

    scorer: KVPScorer

    def __init__(self, store: Sequence[RecordedTrace], config: KVPConfig | None = None, device: str = "cpu") -> None:
        self.store, self.config, self.device = store, config or KVPConfig(), torch.device(device)
        self._check()
        layers, heads, _, head_dim = store[0].keys.shape
        self.scorer = KVPScorer(
            layers,
            heads,
            head_dim,
            self.config.embedding,
            self.config.hidden,
            store[0].rotary.inv_freq.tolist(),
            generator=torch.Generator().manual_seed(self.config.seed),
        ).to(self.device)
        batches = [self.batch(0, layer) for layer in range(layers)]
        keys, values = (torch.cat([getattr(batch, name)[0] for batch in batches]) for name in ("keys", "values"))
        self.scorer.calibrate(keys, values)
        self.average = copy.deepcopy(self.scorer)
        self.optimizer = torch.optim.AdamW(
            self.scorer.parameters(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay
        )

    @property
    def policy(self) -> KVPPolicy:
        """The policy as trained so far, with the running mean of the weights."""
        training = {"learner": self.name, "updates_done": self.done, **asdict(self.config)}
        model = self.store.identity if isinstance(self.store, TraceStore) else None
        return KVPPolicy(self.average, self.name, training, model=model, interval=self.store[0].interval)

    @property
    def parts(self) -> int:
        """How many parts an update has: the agents of a layer each, which learn from nothing of the others."""
        return self.scorer.shape[0]

    def share(self, part: int, epoch: int) -> Share:
        """Rank the pairs of a batch of cuts in one layer, and return the gradient of what was better."""
        began = time.perf_counter()
        batch = self.batch(self.done, part)
        loaded = time.perf_counter()
        own = slice(part, part + 1)
        weights = {name: weight[own].detach().requires_grad_() for name, weight in self.scorer.named_parameters()}
        fixed = {name: getattr(self.scorer, name)[own] for name in ("mean", "deviation")}
        seen = (batch.keys, batch.values, batch.positions, batch.ages)
        with side_by_side(*batch.mask.shape):
            scores = torch.func.functional_call(self.scorer, weights | fixed, seen)[0][..., batch.slots]
            scored = time.perf_counter()
            learn = self._from_payment if self.config.objective == "reinforce" else self._from_utilities
            order, loss, sums = learn(scores, batch)
            gradients = torch.autograd.grad(loss, list(weights.values()))
        # As KVRank-v0 pays it, whatever power of the utilities was learnt from.
        utility = batch.utility.expand(order.shape).gather(-1, order)
        plain, best = (x ** (1 / self.config.power) for x in (utility, batch.utility))
        return Share(
            list(gradients),
            {
                "rollout/ep_rew_mean": float((-cost(plain) / least_cost(best)).mean()) / self.parts,
                "loss/kvp": float(loss.detach()),
                **{tag: value / self.parts for tag, value in sums.items()},
                "time/env": loaded - began,
                "time/policy": scored - loaded,
                "time/learn": time.perf_counter() - scored,
            },
            [self.store[number].name for number, _ in batch.chosen],
        )

    def _from_payment(self, scores: Tensor, batch: Cuts) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Return K rankings drawn by the scores, the loss that what they are paid gives, and metrics."""
        order = self.rank(scores.detach(), batch)
        utility = batch.utility.expand(order.shape).gather(-1, order)
        advantage = leave_one_out(returns(utility, least_cost(batch.utility), self.config.credit), self.config.group)
        # In units of each agent's own spread.
        spread = advantage.square().mean(dim=(0, 3, 4), keepdim=True).sqrt()
        advantage = advantage / spread.clamp(min=1e-8)
        count = batch.mask.sum(dim=-1)
        mask, picks = batch.mask.expand(order.shape), count.expand(order.shape[:-1])
        logs = plackett_luce.log_prob(scores.expand(order.shape), order, mask, picks, order.shape[-1])
        # Averaged over the picks of a ranking, summed over agents, of which each has its own weights.
        loss = -((advantage * logs).sum(dim=-1) / count).mean(dim=(0, 3)).sum()
        entropy = float(-(logs.detach().sum(dim=-1) / count).mean())
        return order, loss, {"loss/entropy": entropy}

    def _from_utilities(self, scores: Tensor, batch: Cuts) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Return the ranking (1, L, H, N, C) by the scores, a supervised loss, summed over agents, and no metrics."""
        mask = batch.mask.expand(scores.shape)
        order = torch.where(mask, scores.detach(), -torch.inf).argsort(dim=-1, descending=True)
        loss = TOLD[self.config.objective](scores, batch.utility, mask) * math.prod(scores.shape[:2])
        return order[None], loss, {}

    def batch(self, update: int, layer: int) -> Cuts:
        """Return the batch of an update in one layer: traces and cuts drawn alike from seed and update."""
        rng = np.random.default_rng([self.config.seed, update])
        numbers = rng.integers(len(self.store), size=self.config.batch_size).tolist()
        chosen = [(number, int(rng.choice(self.store[number].cuts))) for number in numbers]
        traces, drawn = [self.store[number] for number in numbers], [cut for _, cut in chosen]
        own, widest, pad = slice(layer, layer + 1), max(drawn), torch.nn.functional.pad
        keys, values = (
            torch.cat([getattr(trace, name)[own, :, :cut] for trace, cut in zip(traces, drawn, strict=True)], dim=2)
            for name in ("keys", "values")
        )
        cut_utility = [trace.utility_at(cut)[own] for trace, cut in zip(traces, drawn, strict=True)]
        utility = torch.stack([pad(each, (0, widest - each.shape[-1])) for each in cut_utility], dim=2)
        utility = utility.float() ** self.config.power
        cuts, slot = torch.tensor(drawn), torch.arange(widest)
        starts = cuts.cumsum(0) - cuts
        positions = torch.cat([torch.arange(cut) for cut in drawn])
        ages = cuts.repeat_interleave(cuts) - positions
        mask = slot < cuts[:, None]
        slots = torch.where(mask, starts[:, None] + slot, 0)
        tensors = (keys[None].float(), values[None].float(), positions, ages, utility, slots, mask)
        return Cuts(layer, chosen, *(tensor.to(self.device) for tensor in tensors))

    def rank(self, scores: Tensor, batch: Cuts) -> Tensor:
        """Return K rankings (K, 1, H, N, C) of scored pairs (1, H, N, C), most useful first, padding last."""
        sample, _, head, row, slot = (
            torch.arange(size, device=scores.device).view(-1, *(1,) * (4 - axis))
            for axis, size in enumerate((self.config.samples, *scores.shape))
        )
        uniform = noise.uniform(self.config.seed, self.done, sample, batch.layer, head, row, slot)
        # Evict logits go first: here, what goes first is what stays longest.
        drawn = -plackett_luce.priorities(scores, uniform)
        return torch.where(batch.mask, drawn, -torch.inf).argsort(dim=-1, descending=True)

    def step(self, shares: Sequence[Share]) -> dict[str, float]:
        """Descend by the shares of all layers, in order, and update the running mean."""
        config, began = self.config, time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * warm_cosine(self.done, config.updates, config.warmup, 0.01, 0.02)
        weights = list(self.scorer.parameters())
        gradients = [
            torch.cat([share.gradients[number].to(weight.device) for share in shares])
            for number, weight in enumerate(weights)
        ]
        norms = torch.stack([gradient.square().sum(dim=(2, 3)) for gradient in gradients]).sum(dim=0).sqrt()
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient * (config.grad_clip / norms.clamp(min=config.grad_clip))[..., None, None]
        self.optimizer.step()
        follow(self.average, self.scorer, self.done + 1, config.ema)
        metrics = total(shares)
        metrics["time/learn"] += time.perf_counter() - began
        return metrics | {
            "loss/grad_norm": float(norms.max()),
            "loss/learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def _check(self) -> None:
        """Refuse what can't work."""
        config = self.config
        check_numbers(config, ("learning_rate", "grad_clip", "power"), hidden=1, embedding=1, warmup=0)
        if not 0 <= config.ema < 1:
            raise ValueError(f"ema {config.ema} is impossible: it must be at least 0 and below 1")
        if not len(self.store):
            raise ValueError("the store has no traces: record some with `kvenv record`")
        if config.objective not in get_args(Objective):
            raise ValueError(f"unknown objective {config.objective!r}: known are {', '.join(get_args(Objective))}")
        if config.group not in ("trace", "batch"):
            raise ValueError(f"unknown group {config.group!r}: known are trace, batch")
        if config.credit not in ("ranking", "budget"):
            raise ValueError(f"unknown credit {config.credit!r}: known are ranking, budget")
        if config.credit == "budget" and config.group == "batch":
            raise ValueError("credit 'budget' compares picks of the same rank of the same trace: choose group 'trace'")
        others = config.samples * (config.batch_size if config.group == "batch" else 1)
        if min(config.samples, config.batch_size) < 1 or others < 2:
            raise ValueError(
                f"samples {config.samples} and batch_size {config.batch_size} leave a ranking of group "
                f"{config.group!r} nothing to be compared with: choose 2 or more"
            )

    def state(self) -> State:
        """Return weights, their running mean and the optimizer's moments; data and noise follow from ``done``."""
        tensors = module_state(self.scorer, "scorer") | module_state(self.average, "average")
        values = {"learner": self.name, "done": self.done, "store": len(self.store)}
        return State(tensors | optimizer_state(self.optimizer), values)

    def restore(self, state: State) -> None:
        """Go on from a state.

        Raises
        ------
        ValueError
            If the state is of another learner or other shapes, or learnt from a store of another size.
        """
        self.check(state)
        if state.values["store"] != len(self.store):
            raise ValueError(
                f"the store has {len(self.store)} traces, the run learnt from {state.values['store']}: going on would "
                "draw other batches; record into another directory"
            )
        restore_module(self.scorer, state.tensors, "scorer")
        restore_module(self.average, state.tensors, "average")
        self.done = int(state.values["done"])
        self.optimizer.state.clear()
        restore_optimizer(self.optimizer, state.tensors)
