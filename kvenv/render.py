"""What is kept, as text and as a picture: heads × positions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

RENDER_MODES = ("ansi", "rgb_array")

UNSEEN, EVICTED, KEPT, PROTECTED = (235, 235, 235), (40, 42, 54), (255, 165, 48), (72, 133, 237)
"""Colours of tokens not fed yet, evicted pairs, kept candidates and protected pairs."""

_SHADES = " ▁▂▃▄▅▆▇█"
_TEXT_WIDTH, _PICTURE_WIDTH = 96, 768


def render_ansi(positions: np.ndarray, candidates: np.ndarray, *, seen: int, length: int) -> str:
    """Return one line per (layer, KV head): bars show the share of pairs kept along the trace, dots what is to come.

    Parameters
    ----------
    positions : array (L, H, C) of int
        Absolute positions held, -1 where empty.
    candidates : array (L, H, C) of bool
        Evictable slots.
    seen, length : int
        Tokens fed so far, and tokens of the trace.
    """
    state = _states(positions, candidates, seen, length)
    edges = np.unique(np.linspace(0, length, min(_TEXT_WIDTH, length) + 1).astype(int))
    lines = [f"{seen} of {length} tokens decoded"]
    for layer, heads in enumerate(state):
        for head, cells in enumerate(heads):
            bins = [cells[start:stop] for start, stop in pairwise(edges)]
            bars = ["·" if (x == 0).all() else _SHADES[round(float((x[x > 0] > 1).mean()) * 8)] for x in bins]
            lines.append(f"layer {layer:2d} head {head:2d} |{''.join(bars)}|")
    return "\n".join(lines)


def render_rgb(positions: np.ndarray, candidates: np.ndarray, *, seen: int, length: int) -> np.ndarray:
    """Return a picture (height, width, 3) uint8: one stripe per (layer, KV head), positions from left to right.

    Parameters are those of :func:`render_ansi`; the colours are :data:`UNSEEN`, :data:`EVICTED`, :data:`KEPT` and
    :data:`PROTECTED`.
    """
    state = _states(positions, candidates, seen, length)
    picture = np.array([UNSEEN, EVICTED, KEPT, PROTECTED], np.uint8)[state]
    wide = picture.repeat(max(1, _PICTURE_WIDTH // length), axis=2).repeat(8, axis=1)
    # A line between layers.
    framed = np.pad(wide, ((0, 0), (0, 2), (0, 0), (0, 0)), constant_values=255)
    return framed.reshape(-1, *framed.shape[2:])


def _states(positions: np.ndarray, candidates: np.ndarray, seen: int, length: int) -> np.ndarray:
    """Return what became of each token (L, H, length): 0 unseen, 1 evicted, 2 kept, 3 protected."""
    state = np.zeros((*positions.shape[:2], length), np.int64)
    state[..., :seen] = 1
    layer, head, slot = np.nonzero(positions >= 0)
    state[layer, head, positions[layer, head, slot]] = np.where(candidates[layer, head, slot], 2, 3)
    return state
