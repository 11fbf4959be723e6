"""What policies' rankings of the pairs of a full cache cost, beside the oracle's: KVP's reward (arXiv 2602.10238).

At a cut of a trace all its pairs are cached; policies rank those that aren't protected. The cost is KVRank-v0's over
these: it includes policies that need attention statistics, which a trace store doesn't have, under the one protection
that all comparisons are made under.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.golden import FutureAttention, future_attention
from kvenv.layerwise import Policy, rollout
from kvenv.rank_env import cost, least_cost
from kvenv.ranking import eviction_order
from kvenv.state import LayerState, Protection
from kvenv.traces import Trace

ORACLE = "oracle"
UTILITIES = ("max", "sum")
"""ForesightKV's utility, which kvp is trained on by default, and that of KVP's paper."""


class Jury:
    """Ranks by nobody, and notes what the rankings of many policies cost.

    Parameters
    ----------
    policies : mapping of str to Policy
        Who is judged.
    futures : mapping of str to FutureAttention
        The same traces' utilities, by how they are reduced.
    budgets : sequence of int
        At which it is noted what share of the future attention would be lost.

    Attributes
    ----------
    found : dict of str to list of Tensor (N, H, 2 + budgets)
        By policy, and the oracle, layer by layer: cost over the oracle's by either utility, and what is lost at each
        budget of all attention (the sum) that candidates get.
    """

    name = "jury"

    def __init__(
        self, policies: Mapping[str, Policy], futures: Mapping[str, FutureAttention], budgets: Sequence[int]
    ) -> None:
        self.policies, self.futures, self.budgets = policies, futures, budgets
        self.needs: frozenset[str] = frozenset().union(*(policy.needs for policy in policies.values()))
        self.found: dict[str, list[Tensor]] = {name: [] for name in (*policies, ORACLE)}

    def __call__(self, state: LayerState) -> Tensor:
        """Note the costs of a layer, and return priorities that mean nothing."""
        where = (state.layer, state.positions, state.next_position)
        worth = {name: future.at(*where).masked_fill(~state.mask, 0.0) for name, future in self.futures.items()}
        priorities = {name: policy(state) for name, policy in self.policies.items()} | {ORACLE: worth["sum"]}
        count = state.mask.sum(dim=-1, keepdim=True)
        for name, priority in priorities.items():
            # Candidates come first, and of them what is least useful.
            order = eviction_order(priority, state.positions, state.mask)
            place = (count - 1 - torch.arange(order.shape[-1])) % order.shape[-1]
            ranked = {utility: x.gather(-1, order).gather(-1, place) for utility, x in worth.items()}
            over = [cost(ranked[utility]) / least_cost(worth[utility]) for utility in UTILITIES]
            lost = 1 - ranked["sum"].cumsum(dim=-1) / ranked["sum"].sum(dim=-1, keepdim=True)
            protected = int((state.filled & ~state.mask)[0, 0].sum())
            self.found[name].append(torch.stack([*over, *(lost[..., b - protected - 1] for b in self.budgets)], dim=-1))
        return torch.zeros_like(state.positions, dtype=torch.float32)


def rank_costs(
    policies: Mapping[str, Policy],
    traces: Sequence[Trace],
    *,
    model: PreTrainedModel,
    cuts: Sequence[int],
    budgets: Sequence[int],
    interval: int = 16,
) -> dict[str, Tensor]:
    """Return what rankings cost, means over the cuts.

    Parameters
    ----------
    policies : mapping of str to Policy
        Without those that need the future.
    traces : sequence of Trace
        N traces, decoded side by side with the full cache.
    model : PreTrainedModel
        A causal LM on kvenv's attention.
    cuts, budgets : sequence of int
        How many pairs are cached when they are ranked, and how many a budget would keep of them.
    interval : int
        W; the first 4 and the newest W are protected.

    Returns
    -------
    dict of str to Tensor (N, L, H, 2 + budgets)
        See :class:`Jury`.

    Raises
    ------
    ValueError
        If a cut is no multiple of the interval, or a budget keeps all pairs of one, or none but the protected.
    """
    protection = Protection(recent=interval)
    for cut in cuts:
        if cut % interval:
            raise ValueError(f"cut {cut} is impossible: it must be a multiple of the interval, {interval}")
    for budget in budgets:
        if not protection.size(0) < budget < min(cuts):
            raise ValueError(
                f"budget {budget} decides nothing: with cuts {list(cuts)} it must be above {protection.size(0)} and "
                f"below {min(cuts)}"
            )
    jury = Jury(policies, _futures(model, traces, interval, len(cuts)), budgets)
    # Nothing is asked of what comes after a cut: its attention is in the futures.
    asked = [
        replace(trace, tokens=trace.tokens[: cut + 2], prompt_length=cut, answers=())
        for trace in traces
        for cut in cuts
    ]
    terms: dict[str, Any] = {"model": model, "budget": budgets[0], "interval": interval, "protection": protection}
    rollout(jury, asked, schedule="prefill", **terms)
    return {
        name: torch.stack(layers, dim=1).unflatten(0, (-1, len(cuts))).mean(dim=1)
        for name, layers in jury.found.items()
    }


def _futures(model: PreTrainedModel, traces: Sequence[Trace], interval: int, copies: int) -> dict[str, FutureAttention]:
    """Return the utilities of the traces, each ``copies`` times in a row."""
    found = {}
    for name in UTILITIES:
        reduce: Any = name
        tokens = [trace.tokens for trace in traces]
        future, _, _ = future_attention(model, tokens, interval=interval, anchors=0, reduce=reduce)
        repeated = (future.utility.repeat_interleave(copies, dim=1), future.pad.repeat_interleave(copies))
        found[name] = FutureAttention(*repeated, interval)
    return found
