"""What a policy sees of one layer's cache when it ranks pairs for eviction."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from torch import Tensor

from kvenv.checks import check_integer
from kvenv.rotary import Rotary

STATS = ("max", "min", "sum", "sum8", "sum16", "sum32", "cumulative", "decayed")
"""The eight attention statistics of ForesightKV, in the order of the last axis of :attr:`LayerState.stats`."""

NEEDS = ("stats", "last_attention", "queries", "query_moments", "future", "expected_future", "noise")
"""The optional parts of a :class:`LayerState`: a policy names in ``needs`` what it reads, nothing else is computed."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What of a layer's pairs never changes: C new ones, or those in C slots.

    Attributes
    ----------
    layer : int
        Index of the layer.
    keys, values : Tensor (N, H, C, D)
        The pairs; keys carry the rotary phase of their absolute position. Empty slots hold garbage.
    positions : Tensor (N, H, C) int64
        Absolute position of each pair, -1 where the slot is empty; anything where padding.
    groups : int
        G, query heads per KV head.
    rotary : Rotary or None
        The LLM's rotary embedding, which turns keys back to position 0 and queries anywhere.
    """

    layer: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    groups: int
    rotary: Rotary | None = None


@dataclass(frozen=True, kw_only=True)
class LayerState(Pairs):
    """One layer's cache at a decision.

    Shapes: N rows (traces), H KV heads, G query heads per KV head, C slots, D head dimension, W interval. The slot
    index means nothing; ``positions`` says which token a slot holds.

    Attributes
    ----------
    layer, keys, values, positions, groups, rotary
        The cached pairs, see :class:`Pairs`.
    mask : Tensor (N, H, C) bool
        True for candidates: filled and not protected.
    filled : Tensor (N, H, C) bool
        True where the slot holds a pair.
    next_position : Tensor (N,) int64
        Position of the token that is fed next.
    prompt_length : Tensor (N,) int64
        Number of prompt tokens of each trace.
    budget : Tensor (N,) int64
        Pairs each head keeps after the eviction.
    interval : int
        Tokens decoded between two evictions.
    stats : Tensor (N, H, G, C, 8) or None
        Attention statistics, see :data:`STATS`; those of a window come from its own queries.
    last_attention : Tensor (N, H, G, C) or None
        Attention probabilities of the newest query.
    queries : Tensor (N, H, G, W, D) or None
        The last window's rotated queries; ``query_valid`` (N, W) bool says which columns exist.
    query_mean, query_cov : Tensor (N, H, G, D) and (N, H, G, D, D), or None
        Moments of all queries so far, rotated back to position 0.
    future : Tensor (N, H, C) or None
        Golden utility of each cached pair; exists only where the trace is known.
    expected_future : Tensor (N, H, C) or None
        The same, averaged over resampled continuations of the prefix.
    noise : Tensor (N, H, C) or None
        Counter-based uniform noise in (0, 1): a function of seed, rollout, layer, head, window and position.
    encoded : Tensor (N, H, C, K) or None
        What the policy's ``encode`` returned of each pair when it was cached; None where the policy has none, or isn't
        the cache's own (:class:`kvenv.layerwise.Policy`).
    """

    mask: Tensor
    filled: Tensor
    next_position: Tensor
    prompt_length: Tensor
    budget: Tensor
    interval: int
    stats: Tensor | None = None
    last_attention: Tensor | None = None
    queries: Tensor | None = None
    query_valid: Tensor | None = None
    query_mean: Tensor | None = None
    query_cov: Tensor | None = None
    future: Tensor | None = None
    expected_future: Tensor | None = None
    noise: Tensor | None = None
    encoded: Tensor | None = None


def check_needs(needs: object) -> frozenset[str]:
    """Return what is needed of a :class:`LayerState`.

    Raises
    ------
    ValueError
        If it is no list or set, or holds what isn't one of :data:`NEEDS`.
    """
    if isinstance(needs, (str, bytes)) or not isinstance(needs, (Sequence, Set)):
        raise ValueError(f"needs must be a list or set of names, not {needs!r}")
    unknown = [need for need in needs if not isinstance(need, str) or need not in NEEDS]
    if unknown:
        raise ValueError(f"needs names unknown {unknown}: known are {', '.join(NEEDS)}")
    return frozenset(needs)


@dataclass(frozen=True)
class Protection:
    """Which pairs are never evicted: the same mask for every policy.

    Attributes
    ----------
    sinks : int
        The first tokens of the trace.
    recent : int
        The newest tokens.
    prompt : bool
        Whether the whole prompt is protected.

    Raises
    ------
    ValueError
        If a number is negative.
    """

    sinks: int = 4
    recent: int = 16
    prompt: bool = False

    def __post_init__(self) -> None:
        check_integer("sinks", self.sinks, 0)
        check_integer("recent", self.recent, 0)

    def candidates(self, positions: Tensor, next_position: Tensor, prompt_length: Tensor) -> Tensor:
        """Return which slots hold an evictable pair.

        Parameters
        ----------
        positions : Tensor (..., N, H, C) int64
            Absolute positions, -1 where empty.
        next_position, prompt_length : Tensor (N,) int64
            Position of the next token and number of prompt tokens.

        Returns
        -------
        Tensor (..., N, H, C) bool
        """
        first = prompt_length.clamp(min=self.sinks)[:, None, None] if self.prompt else self.sinks
        return (positions >= first) & (positions < (next_position - self.recent)[:, None, None])

    def check(self, budget: int) -> None:
        """Refuse a budget that doesn't hold what is protected, whatever the prompt.

        Raises
        ------
        ValueError
            If it doesn't.
        """
        if budget < self.size(0):
            raise ValueError(
                f"budget {budget} is less than the {self.size(0)} protected pairs (sinks {self.sinks}, recent "
                f"{self.recent}): raise the budget or protect less"
            )

    def size(self, prompt_length: int) -> int:
        """Return how many pairs are protected at most, for a trace with that prompt."""
        return max(self.sinks, prompt_length if self.prompt else 0) + self.recent
