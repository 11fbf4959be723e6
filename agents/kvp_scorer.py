"""KVP's policy (arXiv 2602.10238): a network per (layer, KV head) that sees key, value and position of a pair.

Differs from the paper's in what it must not lose: layer normalisation erases the norms of keys and values, so their
logarithms are inputs of their own; and positions are smooth functions instead of a table of embeddings, so that it
can be asked about positions past the training length. For the same reason keys are turned back to position 0: what a
key says doesn't depend then on where it stands, which the position tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.base import encoded
from agents.head_networks import WIDEST, HeadLinear, HeadNorm, check_sizes
from agents.learned import LearnedPolicy
from kvenv.features import PLACES, log_norms, place
from kvenv.identity import Architecture, ModelIdentity
from kvenv.rotary import Rotary
from kvenv.state import LayerState, Pairs


class KVPScorer(nn.Module):
    """Key and value -> linear -> layer norm each, with norms and places -> two hidden layers -> 1 score.

    Parameters
    ----------
    layers, heads, head_dim : int
        L, H, D.
    embedding : int
        Width of the projections of key and value; the paper's code has 256.
    hidden : int
        Units of the two hidden layers; the paper's code has 256.
    inv_freq : sequence of float
        Angular frequencies of the LLM's rotary embedding.
    generator : torch.Generator, optional
        Of the initial weights.

    Raises
    ------
    ValueError
        If a layer has no units, or too many.
    """

    mean: Tensor
    deviation: Tensor
    inv_freq: Tensor

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        embedding: int,
        hidden: int,
        inv_freq: Sequence[float],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_sizes(embedding=(embedding, WIDEST), hidden=(hidden, WIDEST))
        self.shape = (layers, heads, head_dim, embedding, hidden)
        each = (layers, heads)

        def linear(inputs: int, outputs: int) -> HeadLinear:
            return HeadLinear(each, inputs, outputs, generator)

        self.key, self.key_norm = linear(head_dim, embedding), HeadNorm(each, embedding)
        self.value, self.value_norm = linear(head_dim, embedding), HeadNorm(each, embedding)
        self.first, self.first_norm = linear(2 * embedding + 2 + PLACES, hidden), HeadNorm(each, hidden)
        self.second, self.second_norm = linear(hidden, hidden), HeadNorm(each, hidden)
        self.last = linear(hidden, 1)
        self.register_buffer("inv_freq", torch.tensor(inv_freq), persistent=False)
        self.register_buffer("mean", torch.zeros(*each, 1, 2))
        self.register_buffer("deviation", torch.ones(*each, 1, 2))

    @torch.no_grad()
    def calibrate(self, keys: Tensor, values: Tensor) -> None:
        """Set the constants that standardise the norms from pairs (L, H, M, D)."""
        norms = log_norms(keys, values)
        self.mean.copy_(norms.mean(dim=2, keepdim=True))
        self.deviation.copy_(norms.std(dim=2, keepdim=True).clamp(min=1e-3))

    def forward(
        self, keys: Tensor, values: Tensor, positions: Tensor, ages: Tensor, layer: int | None = None
    ) -> Tensor:
        """Score pairs.

        Parameters
        ----------
        keys, values : Tensor (N, L, H, C, D), or (N, H, C, D) of one layer
            The pairs.
        positions, ages : Tensor (..., C) int64, broadcastable to (N, L, H, C) or (N, H, C)
            Absolute positions, and distances to the next token.
        layer : int, optional
            The layer, if only one is given.

        Returns
        -------
        Tensor (N, L, H, C), or (N, H, C)
            Higher means keep.
        """
        return self.finish(self.begin(keys, values, positions, layer), ages, layer)

    def begin(self, keys: Tensor, values: Tensor, positions: Tensor, layer: int | None = None) -> Tensor:
        """Return what goes into the first hidden layer (..., C, hidden) but for the ages, the only thing that changes.

        Parameters are those of :meth:`forward`.
        """
        at = slice(None) if layer is None else layer
        norms = (log_norms(keys, values) - self.mean[at]) / self.deviation[at]
        turned = Rotary(self.inv_freq).rotate(keys.float(), -positions)
        key, value = self.key_norm(self.key(turned, at), at), self.value_norm(self.value(values.float(), at), at)
        where = place(positions).expand(*keys.shape[:-1], -1)
        fixed, _ = self._columns()
        return (
            torch.cat([key, value, norms, where], dim=-1) @ self.first.weight[at][..., fixed, :] + self.first.bias[at]
        )

    def finish(self, begun: Tensor, ages: Tensor, layer: int | None = None) -> Tensor:
        """Return the scores of pairs by what :meth:`begin` returned of them and their ages (..., C)."""
        at = slice(None) if layer is None else layer
        _, changing = self._columns()
        x = begun + place(ages) @ self.first.weight[at][..., changing, :]
        x = F.silu(self.first_norm(x, at))
        x = F.silu(self.second_norm(self.second(x, at), at))
        return self.last(x, at).squeeze(-1)

    def _columns(self) -> tuple[list[int], slice]:
        """Return which inputs of the first hidden layer never change, and which do: position and age come in turn."""
        where = 2 * self.shape[3] + 2
        return [*range(where), *range(where, where + PLACES, 2)], slice(where + 1, None, 2)


class KVPPolicy(LearnedPolicy):
    """A :class:`KVPScorer` as a policy that travels.

    Parameters
    ----------
    scorer : KVPScorer
        The network.
    name, training, model, budgets, interval
        As in :class:`LearnedPolicy`.
    """

    type = "kvp"
    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        scorer: KVPScorer,
        name: str = "kvp",
        training: dict[str, Any] | None = None,
        *,
        model: ModelIdentity | None = None,
        budgets: Sequence[int] | None = None,
        interval: int | None = None,
    ) -> None:
        self.scorer = scorer
        super().__init__(name, training, model, budgets, interval)

    @torch.no_grad()
    def __call__(self, state: LayerState) -> Tensor:
        """Return the scores (N, H, C) of one layer's pairs."""
        ages = state.next_position[:, None, None] - state.positions
        return self.scorer.finish(encoded(self, state), ages, state.layer)

    @torch.no_grad()
    def encode(self, pairs: Pairs) -> Tensor:
        """Return what the scorer computes once of every pair: (N, H, C, hidden)."""
        return self.scorer.begin(pairs.keys, pairs.values, pairs.positions, pairs.layer)

    @property
    def architecture(self) -> Architecture:
        """What the network's shape says of the LLM."""
        layers, heads, head_dim = self.scorer.shape[:3]
        inv_freq = tuple(self.scorer.inv_freq.tolist())
        return Architecture(layers=layers, kv_heads=heads, head_dim=head_dim, inv_freq=inv_freq)

    def about_network(self) -> dict[str, Any]:
        """Return what the description says of the network."""
        return {"shape": list(self.scorer.shape), "inv_freq": self.scorer.inv_freq.tolist()}

    @classmethod
    def network(cls, description: dict[str, Any]) -> KVPScorer:
        """Return a scorer of a description's shape."""
        layers, heads, head_dim, embedding, hidden = (int(size) for size in description["shape"])
        inv_freq = [float(frequency) for frequency in description["inv_freq"]]
        return KVPScorer(layers, heads, head_dim, embedding, hidden, inv_freq)

    @classmethod
    def build(cls, description: dict[str, Any], **known: Any) -> KVPPolicy:
        """Return a policy with a description's scorer."""
        return cls(cls.network(description), **known)
