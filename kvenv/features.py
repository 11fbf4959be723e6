"""Feature sets: what an observation says of every cached pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvenv.cache import SlotCache
from kvenv.limits import observation_nbytes
from kvenv.registry import FEATURES, register_features
from kvenv.state import NEEDS, STATS, LayerState, Pairs

Observation = dict[str, Tensor]
"""``features`` (N, L, H, C, F) float32, ``positions`` (N, L, H, C) int64, ``mask`` (N, L, H, C) int8."""

STATS_FEATURES = ("key_norm", "value_norm", "position", "age", *STATS)
"""The F = 12 features of the set ``stats``, in order."""

OBSERVABLE = tuple(need for need in NEEDS if need not in ("future", "expected_future"))
"""The optional parts of a layer's state that features may read: what a causal agent can know."""

MEMORY_TABLE_MODELS = (
    ("tiny", 5, 2, 2, 32, 80),
    ("Qwen2.5-0.5B", 24, 2, 7, 64, 1280),
    ("Qwen3-4B", 36, 8, 4, 128, 1280),
    ("Qwen2.5-7B", 28, 4, 7, 128, 1280),
)
"""Name, layers, KV heads, query heads per KV head, head dimension and slots."""


@dataclass(frozen=True)
class Split:
    """A feature set in two parts, so that what a pair says once and for all is computed once.

    Attributes
    ----------
    fixed : callable
        Pairs -> Tensor (N, H, C, P) float32, what never changes while a pair is cached.
    changing : callable
        LayerState -> Tensor (N, H, C, F - P) float32, the rest.
    columns : callable
        (head_dim, queries_per_kv_head) -> the P columns of the feature set that are ``fixed``'s, in its order; the
        others are ``changing``'s, in its order.
    """

    fixed: Callable[[Pairs], Tensor]
    changing: Callable[[LayerState], Tensor]
    columns: Callable[[int, int], list[int]]


@dataclass(frozen=True)
class FeatureSet:
    """A named map from a layer's state to features.

    Attributes
    ----------
    name : str
        Its registered name.
    fn : callable
        LayerState -> Tensor (N, H, C, F), or several that are put side by side and have F columns in all.
    size : int or callable
        F, or a function of (head_dim, queries_per_kv_head) that returns it.
    needs : frozenset of str
        Optional parts of the state that ``fn`` reads, of :data:`OBSERVABLE`.
    split : Split, optional
        The same features in two parts.

    Raises
    ------
    ValueError
        If a need is none of those.
    """

    name: str
    fn: Callable[[LayerState], Tensor | Sequence[Tensor]]
    size: int | Callable[[int, int], int]
    needs: frozenset[str]
    split: Split | None = None

    def __post_init__(self) -> None:
        unknown = set(self.needs) - set(OBSERVABLE)
        if unknown:
            raise ValueError(f"features {self.name!r} need {sorted(unknown)}: known are {', '.join(OBSERVABLE)}")

    def width(self, head_dim: int, groups: int) -> int:
        """Return F for a model with that head dimension D and G query heads per KV head."""
        return self.size if isinstance(self.size, int) else self.size(head_dim, groups)

    def compute(self, state: LayerState, out: Tensor | None = None) -> Tensor:
        """Return one layer's features (N, H, C, F) float32, zero in empty slots.

        Parameters
        ----------
        state : LayerState
            The layer's state.
        out : Tensor (N, H, C, F) float32, optional
            Where to write them.

        Raises
        ------
        ValueError
            If the function returns no tensor or another shape.
        """
        parts = self.fn(state)
        parts = (parts,) if isinstance(parts, Tensor) else parts
        for part in parts:
            if not isinstance(part, Tensor) or part.shape[:-1] != state.positions.shape:
                raise ValueError(
                    f"features {self.name!r} returned {_describe(part)}: a tensor of shape "
                    f"{tuple(state.positions.shape)} and F (N, H, C, F) was expected"
                )
        widths = [part.shape[-1] for part in parts]
        if out is None:
            out = torch.empty(*state.positions.shape, sum(widths), device=state.positions.device)
        elif out.shape[-1] != sum(widths):
            raise ValueError(
                f"features {self.name!r} returned {sum(widths)} numbers per slot: they were registered with "
                f"size {out.shape[-1]}"
            )
        # All bits of an empty slot's features to 0, whatever they are: a selection takes a CPU four times as long.
        kept = -state.filled[..., None].int()
        for part, columns in zip(parts, out.view(torch.int32).split(widths, dim=-1), strict=True):
            torch.bitwise_and(part.float().view(torch.int32), kept, out=columns)
        return out

    def observe(self, cache: SlotCache) -> Observation:
        """Return the observation of every row of a cache; it shares no memory with the cache.

        Raises
        ------
        ValueError
            If the function returns another shape than it was registered with.
        """
        layers, rows, heads, slots = cache.positions.shape
        mask = cache.candidates()
        width = self.width(cache.head_dim, cache.groups)
        features = torch.empty(rows, layers, heads, slots, width, device=cache.positions.device)
        for layer in range(layers):
            self.compute(cache.layer_state(layer, needs=self.needs, mask=mask[layer]), out=features[:, layer])
        return {
            "features": features,
            "positions": cache.positions.transpose(0, 1).clone(memory_format=torch.contiguous_format),
            "mask": mask.transpose(0, 1).to(torch.int8, memory_format=torch.contiguous_format),
        }


def feature_set(name: str) -> FeatureSet:
    """Return the feature set of that name.

    Raises
    ------
    ValueError
        If there is none; the message lists the known ones.
    """
    return FeatureSet(name, *FEATURES.get(name))


def kv(state: LayerState) -> list[Tensor]:
    """KVP's view of a pair: key, value, absolute position; F = 2D + 1 (arXiv 2602.10238)."""
    return [state.keys, state.values, state.positions[..., None]]


def foresight(state: LayerState) -> list[Tensor]:
    """ForesightKV's view: key, value, eight attention statistics per query head; F = 2D + 8G (arXiv 2602.03203)."""
    return [state.keys, state.values, *_needed(state).unbind(dim=2)]


def stats(state: LayerState) -> Tensor:
    """Twelve small numbers per pair, for stock RL libraries: :data:`STATS_FEATURES`, each of order 1.

    Norms as log(1 + norm); position and age in tokens as log2(1 + x) / 16; attention statistics averaged over the
    group's query heads, as log(1 + mean attention per query * cached pairs), so that uniform attention gives log 2,
    however many slots are empty.
    """
    age = _ages(state)
    places = [torch.log2(1 + x.clamp(min=0).float()) / 16 for x in (state.positions, age)]
    norms = [torch.log1p(x.float().norm(dim=-1)) for x in (state.keys, state.values)]
    attention = dict(zip(STATS, _needed(state).float().mean(dim=2).unbind(dim=-1), strict=True))
    attention["cumulative"] = attention["cumulative"] / age.clamp(min=1)
    for name, span in (("sum", state.interval), ("sum8", 8), ("sum16", 16), ("sum32", 32)):
        attention[name] = attention[name] / min(span, state.interval)
    # Weights of 0.9 per window add up to ten windows.
    attention["decayed"] = attention["decayed"] / (10 * state.interval)
    cached = state.filled.sum(dim=-1, keepdim=True)
    relative = [torch.log1p(x * cached) for x in attention.values()]
    return torch.stack([*norms, *places, *relative], dim=-1)


OCTAVES = 3
PLACES = 2 * (1 + 2 * OCTAVES)
"""Numbers that tell where a pair is."""


def place(x: Tensor) -> Tensor:
    """Return features (..., PLACES / 2) of order 1 of a position or an age (...) in tokens.

    The logarithm, so that twice the length is one step further and not another world, and its waves, so that a small
    network can tell one step from the next.
    """
    log = (torch.log2(1 + x.clamp(min=0).float()) / 8)[..., None]
    angles = log * (torch.pi * 2.0 ** torch.arange(OCTAVES, device=x.device))
    return torch.cat([log - 0.75, angles.sin(), angles.cos()], dim=-1)


def places(positions: Tensor, ages: Tensor) -> Tensor:
    """Return the features (..., PLACES) of absolute positions and ages, in turn: see :func:`place`."""
    return torch.stack([place(x) for x in torch.broadcast_tensors(positions, ages)], dim=-1).flatten(-2)


def log_norms(keys: Tensor, values: Tensor) -> Tensor:
    """Return the logarithms (..., C, 2) of the norms of keys and values."""
    return torch.stack([x.float().norm(dim=-1).clamp(min=1e-6).log() for x in (keys, values)], dim=-1)


def pre_rope(state: LayerState) -> Tensor:
    """Key without its rotary phase, value, eight attention statistics per query head, norms, places.

    F = 2D + 8G + 2 + :data:`PLACES`. What a rotated key says depends on where it stands; turned back to position 0 it
    says what the token is, and the places tell the rest.
    """
    where = places(state.positions, _ages(state))
    norms = log_norms(state.keys, state.values)
    return torch.cat([_unrotated(state), state.values.float(), _by_query_head(state), norms, where], dim=-1)


def _pre_rope_fixed(pairs: Pairs) -> Tensor:
    norms = log_norms(pairs.keys, pairs.values)
    return torch.cat([_unrotated(pairs), pairs.values.float(), norms, place(pairs.positions)], dim=-1)


def _pre_rope_changing(state: LayerState) -> Tensor:
    return torch.cat([_by_query_head(state), place(_ages(state))], dim=-1)


def _pre_rope_columns(head_dim: int, groups: int) -> list[int]:
    norms = 2 * head_dim + 8 * groups
    return [*range(2 * head_dim), norms, norms + 1, *range(norms + 2, norms + 2 + PLACES, 2)]


def _unrotated(pairs: Pairs) -> Tensor:
    """Return keys (N, H, C, D) turned back to position 0."""
    if pairs.rotary is None:
        raise ValueError("the features read state.rotary, which is None: take the state of a cache")
    return pairs.rotary.unrotate(pairs.keys.float(), pairs.positions)


def _ages(state: LayerState) -> Tensor:
    """Return how many tokens ago (N, H, C) pairs were fed."""
    return state.next_position[:, None, None] - state.positions


def _by_query_head(state: LayerState) -> Tensor:
    """Return the statistics (N, H, C, 8G) of every pair, query head by query head."""
    return _needed(state).transpose(2, 3).flatten(3).float()


register_features("kv", kv, lambda head_dim, groups: 2 * head_dim + 1)
register_features("foresight", foresight, lambda head_dim, groups: 2 * head_dim + 8 * groups, frozenset({"stats"}))
register_features(
    "pre-rope",
    pre_rope,
    lambda head_dim, groups: 2 * head_dim + 8 * groups + 2 + PLACES,
    frozenset({"stats"}),
    Split(_pre_rope_fixed, _pre_rope_changing, _pre_rope_columns),
)
register_features("stats", stats, len(STATS_FEATURES), frozenset({"stats"}))


def memory_table() -> str:
    """Return the table of observation sizes in :class:`kvenv.KVEvictEnv`'s docstring."""
    lines = ["| LLM | L × H × C | `stats` | `kv` | `foresight` |", "| --- | --- | --- | --- | --- |"]
    for name, layers, heads, groups, head_dim, slots in MEMORY_TABLE_MODELS:
        widths = (feature_set(features).width(head_dim, groups) for features in ("stats", "kv", "foresight"))
        sizes = (observation_nbytes(layers, heads, slots, width) / 1e6 for width in widths)
        cells = [name, f"{layers} × {heads} × {slots:,}", *(f"{size:,.2f} MB" for size in sizes)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _describe(x: object) -> str:
    """Return the shape of a tensor, the type of anything else."""
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _needed(state: LayerState) -> Tensor:
    """Return the attention statistics, which these feature sets declare that they need."""
    if state.stats is None:
        raise ValueError("the features read state.stats, which is None: name 'stats' in needs")
    return state.stats
