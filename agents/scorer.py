"""A learned policy: one small network per (layer, KV head) that scores cached pairs (ForesightKV, arXiv 2602.03203)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from agents.head_networks import DEEPEST, WIDEST, At, HeadLinear, HeadNorm, check_sizes
from agents.learned import LearnedPolicy
from kvenv.features import Split, feature_set
from kvenv.identity import Architecture, ModelIdentity, cache_shape
from kvenv.state import LayerState, Pairs

Inputs = Literal["squashed", "standardised", "raw"]

LINEAR = 1e3
"""Spreads within which the inverse hyperbolic sine is a straight line to a millionth of its range."""


def _asinh(x: Tensor) -> Tensor:
    """Return the inverse hyperbolic sine; torch's own is not vectorised on a CPU and takes five times as long."""
    square = x * x
    return torch.log1p(x.abs() + square / (1 + (1 + square).sqrt())).copysign(x)


def _median(x: Tensor) -> Tensor:
    """Return the lower median (H, 1, F) of (H, M, F); torch's own isn't deterministic on CUDA."""
    return x.sort(dim=1).values[:, (x.shape[1] - 1) // 2, None]


class Scorer(nn.Module):
    """F features -> one or more hidden layers -> 1 score, with weights of its own for every (layer, KV head).

    One hidden layer is the paper's: GELU units. Of several, each is normalised (layer normalisation, SiLU), as in KVP.

    Inputs are squashed and standardised per (layer, head, feature) with constants that :meth:`calibrate` takes from
    data. Unlike a normalisation over features this keeps the norms of keys and values, and the inverse hyperbolic sine
    keeps both small and large attention statistics apart.

    Parameters
    ----------
    layers, heads, features : int
        L, H, F.
    hidden : int
        Units of a hidden layer; the paper's code has 16.
    depth : int
        Hidden layers.
    generator : torch.Generator, optional
        Draws the initial weights; the global one if not given.

    Raises
    ------
    ValueError
        If there are no hidden units or layers, or too many.
    """

    centre: Tensor
    scale: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        layers: int,
        heads: int,
        features: int,
        hidden: int = 16,
        depth: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_sizes(hidden=(hidden, WIDEST), depth=(depth, DEEPEST))
        self.shape = (layers, heads, features, hidden, depth)
        each, widths = (layers, heads), [features, *[hidden] * depth]
        self.hidden = nn.ModuleList(HeadLinear(each, *sizes, generator) for sizes in pairwise(widths))
        self.norms = nn.ModuleList(HeadNorm(each, hidden) for _ in range(depth if depth > 1 else 0))
        # No bias: what is added to all scores of a decision changes no ranking.
        self.last = nn.Parameter(torch.randn(*each, hidden, 1, generator=generator) * hidden**-0.5)
        for name, value in (("centre", 0.0), ("scale", 1.0), ("mean", 0.0), ("deviation", 1.0)):
            self.register_buffer(name, torch.full((layers, heads, 1, features), value))

    @torch.no_grad()
    def calibrate(self, features: Tensor, filled: Tensor, inputs: Inputs = "squashed") -> None:
        """Set the input constants from data.

        Parameters
        ----------
        features : Tensor (N, L, H, C, F)
            Features of the slots of a few decisions.
        filled : Tensor (N, L, H, C) bool
            Slots that hold a pair, the same number in every (layer, head) of a row.
        inputs : {"squashed", "standardised", "raw"}
            For comparisons: "standardised" doesn't squash, "raw" leaves features as they are.
        """
        # Layer by layer, since it takes several copies of the features.
        for layer in range(self.shape[0]):
            self._calibrate(layer, features[:, layer].float(), filled[:, layer], inputs)

    def _calibrate(self, layer: int, features: Tensor, filled: Tensor, inputs: Inputs) -> None:
        """Set a layer's input constants from features (N, H, C, F)."""
        _, heads, width = self.shape[:3]
        centre, scale, mean, deviation = (x[layer] for x in (self.centre, self.scale, self.mean, self.deviation))
        x = features.transpose(0, 1)[filled.transpose(0, 1)].view(heads, -1, width)
        spread = x.std(dim=1, keepdim=True).clamp(min=1e-6)
        centre.copy_(_median(x))
        distance = _median((x - centre).abs())
        # A statistic that is mostly zero has no median distance: a part of its spread stands in.
        scale.copy_(torch.maximum(distance, 0.01 * spread) if inputs == "squashed" else LINEAR * spread)
        if inputs == "raw":
            centre.zero_()
            mean.zero_()
            deviation.copy_(1 / scale)
            return
        squashed = _asinh((x - centre) / scale)
        mean.copy_(squashed.mean(dim=1, keepdim=True))
        deviation.copy_(squashed.std(dim=1, keepdim=True).clamp(min=1e-3))

    def part(self, layer: int) -> Scorer:
        """Return the scorer of one layer, its layer 0; it shares memory with this one, which learns with it."""
        part = Scorer(1, *self.shape[1:])
        own = dict((*part.named_parameters(), *part.named_buffers()))
        for name, whole in (*self.named_parameters(), *self.named_buffers()):
            own[name].data = whole.data[layer : layer + 1]
        return part

    def forward(self, features: Tensor, layer: int | tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Score pairs.

        Parameters
        ----------
        features : Tensor (N, L, H, C, F), or (N, H, C, F) of one layer, or (B, C, F) of B heads
            Raw features.
        layer : int or (Tensor (B,), Tensor (B,)), optional
            The layer, if only one is given; layers and heads, if heads are.

        Returns
        -------
        Tensor (N, L, H, C), or (N, H, C), or (B, C)
            Higher means keep.
        """
        at: At = slice(None) if layer is None else layer
        squashed = _asinh((features.float() - self.centre[at]) / self.scale[at])
        x = (squashed - self.mean[at]) / self.deviation[at]
        return self.from_first(self.hidden[0](x, at), at)

    def first_half(self, layer: int, columns: Tensor, *, bias: bool) -> Half:
        """Return the part of a layer's first hidden layer that some of the features' columns (P,) go into."""
        first: Any = self.hidden[0]
        scale, deviation = self.scale[layer][..., columns], self.deviation[layer][..., columns]
        centre, mean = self.centre[layer][..., columns] / scale, self.mean[layer][..., columns] / deviation
        weight = first.weight[layer][:, columns]
        offset = -mean @ weight
        weight = weight / deviation.transpose(-1, -2)
        return Half(1 / scale, -centre, weight, offset + first.bias[layer] if bias else offset)

    def version(self) -> object:
        """Return what changes whenever inputs' constants or the first hidden layer do; None if nobody can tell."""
        first: Any = self.hidden[0]
        parts = (self.centre, self.scale, self.mean, self.deviation, first.weight, first.bias)
        if torch.compiler.is_compiling() or any(x.is_inference() for x in parts):
            return None
        return tuple((id(x), x._version) for x in parts)

    def from_first(self, x: Tensor, at: At) -> Tensor:
        """Return scores from what the first hidden layer makes of the inputs, before its activation.

        Parameters are those of :meth:`forward`, with hidden units instead of features.
        """
        if not self.norms:
            x = F.gelu(x)
        for number, norm in enumerate(self.norms):
            x = F.silu(norm(self.hidden[number](x, at) if number else x, at))
        return (x @ self.last[at]).squeeze(-1)


@dataclass(frozen=True)
class Half:
    """A part of a first hidden layer: some columns of the features, standardised, times their weights.

    Attributes
    ----------
    factor, offset : Tensor (H, 1, P)
        What features are multiplied by, and what is added, before they are squashed.
    weight : Tensor (H, P, hidden)
        After that, the standardisation within.
    bias : Tensor (H, 1, hidden)
        Added to the product.
    """

    factor: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Map features (N, H, C, P) to (N, H, C, hidden)."""
        return _asinh(torch.addcmul(self.offset, features, self.factor)) @ self.weight + self.bias


class ScorerPolicy(LearnedPolicy):
    """A :class:`Scorer` over one of the environment's feature sets, as a policy that travels.

    Parameters
    ----------
    scorer : Scorer
        The network.
    features : str
        Name of the feature set it was built for.
    name, training, model, budgets, interval
        As in :class:`LearnedPolicy`.
    """

    type = "scorer"

    def __init__(
        self,
        scorer: Scorer,
        features: str,
        name: str = "scorer",
        training: dict[str, Any] | None = None,
        *,
        model: ModelIdentity | None = None,
        budgets: Sequence[int] | None = None,
        interval: int | None = None,
    ) -> None:
        self.scorer, self.features = scorer, features
        super().__init__(name, training, model, budgets, interval)
        self._set = feature_set(features)
        self.needs = self._set.needs
        self._halves: dict[int, tuple[object, Half, Half]] = {}

    @torch.no_grad()
    def __call__(self, state: LayerState) -> Tensor:
        """Return the scores (N, H, C) of one layer's pairs."""
        if state.encoded is not None and self._set.split is not None:
            _, _, half = self._halves[state.layer]
            changing = half(self._set.split.changing(state))
            return self.scorer.from_first(state.encoded + changing, state.layer)
        return self.scorer(self._set.compute(state), state.layer)

    @property
    def encode(self) -> Callable[[Pairs], Tensor] | None:
        """What is computed once of every pair (:class:`kvenv.layerwise.Policy`); None if its features all change."""
        return self._encode if self._set.split is not None else None

    @torch.no_grad()
    def _encode(self, pairs: Pairs) -> Tensor:
        """Return what pairs' fixed features (N, H, C, P) add to the first hidden layer: (N, H, C, hidden)."""
        split, layer = self._set.split, pairs.layer
        if split is None:
            raise ValueError(f"features {self.features!r} have no part that never changes")
        head_dim, width = pairs.keys.shape[-1], self._set.width(pairs.keys.shape[-1], pairs.groups)
        weights = self.scorer.version()
        made_of, half, _ = self._halves.get(layer, (None, None, None))
        if half is None or weights is None or weights != made_of:
            columns, others = _columns(split, head_dim, pairs.groups, width, pairs.keys.device)
            half = self.scorer.first_half(layer, columns, bias=True)
            self._halves[layer] = weights, half, self.scorer.first_half(layer, others, bias=False)
        return half(split.fixed(pairs))

    @property
    def architecture(self) -> Architecture:
        """What the network's shape says of the LLM."""
        return Architecture(layers=self.scorer.shape[0], kv_heads=self.scorer.shape[1])

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model that it wasn't made for, see :meth:`LearnedPolicy.check_model`.

        Raises
        ------
        ValueError
            With all that differs.
        """
        super().check_model(model)
        _, _, groups, head_dim = cache_shape(model)
        width = self._set.width(head_dim, groups)
        if width != self.scorer.shape[2]:
            raise ValueError(
                f"policy {self.name!r} takes {self.scorer.shape[2]} numbers of a pair: features {self.features!r} of "
                f"this model are {width}"
            )

    def about_network(self) -> dict[str, Any]:
        """Return what the description says of the network."""
        return {"features": self.features, "shape": list(self.scorer.shape)}

    @classmethod
    def network(cls, description: dict[str, Any]) -> Scorer:
        """Return a scorer of a description's shape."""
        layers, heads, features, hidden, depth = (int(size) for size in description["shape"])
        return Scorer(layers, heads, features, hidden, depth)

    @classmethod
    def build(cls, description: dict[str, Any], **known: Any) -> ScorerPolicy:
        """Return a policy with a description's scorer."""
        return cls(cls.network(description), str(description["features"]), **known)


@cache
def _columns(split: Split, head_dim: int, groups: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the columns of what never changes, and the others, where the device finds them without a copy."""
    fixed = split.columns(head_dim, groups)
    others = [column for column in range(width) if column not in fixed]
    first, second = (torch.tensor(columns, dtype=torch.int64, device=device) for columns in (fixed, others))
    return first, second
