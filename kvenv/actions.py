"""Actions as environments are given them: refused if they are none, else keep-priorities on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def priorities(action: Any, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Return an action as keep-priorities.

    Parameters
    ----------
    action : array or Tensor
        Real numbers; only their order counts.
    shape : tuple of int
        (L, H, C), or (N, L, H, C) of several rows.
    device : torch.device or str
        Where the priorities are needed.

    Returns
    -------
    Tensor
        Of that shape and on that device.

    Raises
    ------
    ValueError
        If the action has another shape, is no dense array of real numbers, or contains NaN.
    """
    what = "actions" if len(shape) == 4 else "action"
    given = action.detach() if isinstance(action, Tensor) else _array(action, what)
    if tuple(given.shape) != shape:
        axes = ", ".join("NLHC"[-len(shape) :])
        found = "have" if what == "actions" else "has"
        raise ValueError(f"{what} {found} shape {tuple(given.shape)}: {shape} ({axes}) was expected")
    nan = f"{what} contain{'s' * (what == 'action')} NaN: every slot needs a keep-priority, whether or not it can go"
    if isinstance(given, Tensor):
        if given.is_complex() or given.is_meta or given.layout is not torch.strided:
            raise ValueError(f"{what} must be dense real numbers, not {given.dtype}, {given.layout} on {given.device}")
        try:
            torch._assert_async(~given.isnan().any(), nan)
        except RuntimeError as error:  # at once on the CPU; on an accelerator later and fatal, but nothing waits
            raise ValueError(nan) from error
        return given.to(device)
    if np.isnan(given).any():
        raise ValueError(nan)
    # A copy, because not every array (reversed, read-only) can be a tensor.
    return torch.as_tensor(np.array(given), device=device)


def _array(action: Any, what: str) -> np.ndarray:
    """Return an action as an array of floats that torch knows."""
    try:
        array = np.asarray(action)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} must be an array of numbers: {error}") from error
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{what} must be an array of real numbers, not of {array.dtype}")
    return array if array.dtype in (np.float16, np.float32, np.float64) else array.astype(np.float64)
