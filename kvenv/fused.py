"""Attention and what slots receive of it in one fused pass: the probabilities of S queries over C slots are never held.

Only on CUDA and where Triton is; PyTorch's path (:func:`kvenv.attention.attention_probabilities`) is the reference, and
serves everywhere else.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from kvenv.attention import BEYOND, attention_probabilities, causal_bias

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute with, accumulating in float32."""

LARGEST_HEAD = 512
"""Bytes of the largest head that fits their blocks."""

_log = logging.getLogger("kvenv")


@dataclass(frozen=True)
class Attended:
    """Attention, and what slots receive of it.

    Attributes
    ----------
    output : Tensor (N, H, G, S, D)
        Attention output, in the queries' dtype.
    sums : Tensor (N, H, G or 1, R, C) float32
        Weighted sums of probabilities over the queries.
    extremes : Tensor (N, H, G or 1, 2 or 0, C) float32
        Largest and smallest probability of queries whose first weight isn't 0: 0 and 1 if there is none.
    """

    output: Tensor
    sums: Tensor
    extremes: Tensor


def serves(query: Tensor) -> bool:
    """Return whether :func:`attend` takes queries (..., D) of this kind; on a device's first use that is tried out."""
    return query.is_cuda and not query.requires_grad and _works(query.device, query.dtype, query.shape[-1])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: Tensor,
    held: Tensor,
    weights: Tensor,
    scaling: float,
    *,
    extremes: bool = False,
    largest_of_group: bool = False,
) -> Attended:
    """Attend causally and reduce the probabilities over the queries.

    Parameters
    ----------
    query : Tensor (N, H, G, S, D)
        Queries by the KV head they read.
    key, value : Tensor (N, H, C, D)
        Pairs.
    reach : Tensor (N or 1, 1, S, 1) float32
        Position of each query, see :func:`kvenv.attention.causal_bias`.
    held : Tensor (N, H or 1, 1, C) float32
        Position of each pair, likewise.
    weights : Tensor (N, R, S) float32
        Weights of the queries in each sum; 0 where padding.
    scaling : float
        Factor on the logits.
    extremes : bool
        Whether to return the extremes too.
    largest_of_group : bool
        Reduce the group's largest probability instead of each query head's.

    Returns
    -------
    Attended
    """
    from kvenv import kernels  # imports Triton, which not every platform has

    rows, heads, groups, queries, head_dim = query.shape
    slots, sums = key.shape[2], weights.shape[1]
    members = groups if largest_of_group else 1
    query, weights = query.contiguous(), weights.contiguous()
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    reach, held = reach.expand(rows, 1, queries, 1), held.expand(rows, heads, 1, slots)
    received = weights.new_empty(rows, heads, groups // members, sums + 2 * extremes, slots)
    output, normalisers = torch.empty_like(query), weights.new_empty(2, *query.shape[:-1])
    asked = (query, key, reach, held)
    sizes = (scaling, heads, groups, queries, slots)
    strides = (reach.stride(0), *held.stride()[:2], *key.stride()[:3])
    with torch.cuda.device_of(query):
        fixed = configuration(query.dtype, head_dim, groups * queries)
        kernels.attend_kernel[rows * heads, -(-groups * queries // fixed["BLOCK_QUERIES"])](
            *asked, value, output, *normalisers, *sizes, *strides, *value.stride()[:3], **fixed
        )
        fixed = configuration(query.dtype, head_dim, queries)
        kernels.reduce_kernel[rows * heads * groups // members, -(-slots // fixed["BLOCK_SLOTS"])](
            *asked, weights, *normalisers, received, *sizes, members, *strides, **fixed, SUMS=sums, EXTREMES=extremes
        )
    return Attended(output, received[..., :sums, :], received[..., sums:, :])


def configuration(dtype: torch.dtype, head_dim: int, queries: int) -> dict[str, int]:
    """Return what kernels are compiled for and how: within 99 KiB of shared memory, the least since sm_80."""
    most = 64 if dtype.itemsize == 2 and head_dim <= 128 else 16
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": _padded(head_dim),
        "BLOCK_QUERIES": min(_padded(queries), most),
        "BLOCK_SLOTS": 64,
        "num_warps": 4,
        "num_stages": 2,
        "enable_fp_fusion": True,  # Triton's default, but 3.9 warns that it won't be
    }


def _padded(size: int) -> int:
    """Return the power of two that a kernel takes for a size: at least 16, the least of a matrix product."""
    return max(16, 1 << (size - 1).bit_length())


@cache
def _works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the kernels compute what PyTorch does; where they should and don't, say why."""
    if dtype not in DTYPES or _padded(head_dim) * dtype.itemsize > LARGEST_HEAD or find_spec("triton") is None:
        return False
    try:
        check(device, dtype, head_dim)
    except Exception as error:  # compilers and drivers raise whatever they like
        _log.warning(
            "fused attention of %s and %d dimensions fails on %s, PyTorch serves: %s", dtype, head_dim, device, error
        )
        return False
    return True


def check(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Compare :func:`attend` with :func:`reference` on a small case with empty slots, padding and blind queries.

    Raises
    ------
    AssertionError
        If they differ.
    """
    rng = torch.Generator(device).manual_seed(0)
    query = torch.randn(1, 2, 2, 40, head_dim, generator=rng, device=device).to(dtype)
    key, value = torch.randn(2, 1, 2, 90, head_dim, generator=rng, device=device).to(dtype)
    held = torch.rand(1, 2, 1, 90, generator=rng, device=device).argsort(dim=-1).float()
    reach = 2 * torch.arange(40.0, device=device)[:, None]
    weights = torch.rand(1, 5, 40, generator=rng, device=device) * (reach > 8).T
    case = (query, key, value, reach, torch.where(held < 20, BEYOND, held), weights, head_dim**-0.5)
    rounding = max(1e-4, 4 * torch.finfo(dtype).eps)
    for largest_of_group in (False, True):
        ours, exact = (
            f(*case, extremes=not largest_of_group, largest_of_group=largest_of_group) for f in (attend, reference)
        )
        torch.testing.assert_close(ours.output.double(), exact.output, rtol=rounding, atol=rounding)
        torch.testing.assert_close(ours.sums.double(), exact.sums, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.extremes.double(), exact.extremes, rtol=1e-4, atol=1e-4)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: Tensor,
    held: Tensor,
    weights: Tensor,
    scaling: float,
    *,
    extremes: bool = False,
    largest_of_group: bool = False,
) -> Attended:
    """Return what :func:`attend` does, by PyTorch's path and in float64."""
    query, key, value, weights = (x.double() for x in (query, key, value, weights))
    probabilities = attention_probabilities(query, key, causal_bias(reach, held, query.dtype), scaling)
    output = (probabilities.flatten(2, 3) @ value).view(query.shape)
    if largest_of_group:
        probabilities = probabilities.amax(dim=2, keepdim=True)
    counts = (weights[:, 0] != 0)[:, None, None, :, None]
    bounds = [torch.where(counts, probabilities, 0).amax(dim=3), torch.where(counts, probabilities, 1).amin(dim=3)]
    sums = weights[:, None, None] @ probabilities
    return Attended(output, sums, torch.stack(bounds, dim=3) if extremes else sums[..., :0, :])
