"""What nobody should pass: values of every kind, JSON of any shape, and valid JSON with something changed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

HUGE = [2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400, -(10**30)]

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from(HUGE),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=3),
    st.lists(st.integers(-1, 40), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.builds(lambda x: np.array(x), st.integers(0, 3)),
    st.builds(lambda x: np.array(x), st.lists(st.floats(), max_size=3)),
    st.builds(np.int64, st.integers(-1, 40)),
    st.builds(lambda x: torch.tensor(x), st.integers(0, 3)),
    st.builds(object),
    st.just(2j),
)
"""A value of any kind."""

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from(HUGE),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["\ud800", "../x", "/etc/passwd", "tiny", "\0", "NaN"]),
)

JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
)
"""What JSON can hold, and NaN, which Python's reads and writes, too."""


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """Return a JSON value with something in it replaced, dropped, or doubled, up to three times."""
    whole = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(_places(whole))))
        inside, key = path
        how = draw(st.sampled_from(["replace", "replace", "drop", "grow"]))
        if how == "drop" and inside is not whole:
            del inside[key]
        elif how == "grow" and isinstance(inside[key], (int, float)):
            inside[key] = inside[key] * draw(st.sampled_from([-1, 2, 1000, 10**9]))
        elif how == "grow" and isinstance(inside[key], list):
            inside[key] = inside[key] * 2
        else:
            inside[key] = draw(JSON)
    return whole[0]


def _places(value: Any) -> Any:
    """Yield (container, key) of everything in a JSON value."""
    for key in range(len(value)) if isinstance(value, list) else list(value):
        yield value, key
        if isinstance(value[key], (list, dict)):
            yield from _places(value[key])


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Return bytes cut short, with bits turned, something put in, or something else altogether."""
    how = draw(st.sampled_from(["cut", "turn", "insert", "else"]))
    if how == "else" or not data:
        return draw(st.binary(max_size=40))
    place = draw(st.integers(0, min(len(data) - 1, 300)) | st.integers(0, len(data) - 1))
    if how == "cut":
        return data[:place]
    if how == "insert":
        return data[:place] + draw(st.binary(min_size=1, max_size=9)) + data[place:]
    turned = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        turned[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(turned)
