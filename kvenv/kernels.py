"""The Triton kernels of :mod:`kvenv.fused`.

The first goes over the slots with an online softmax (FlashAttention, arXiv 2205.14135) and leaves each query's largest
logit and softmax denominator; the second goes over the queries, makes the probabilities again and reduces them. Nothing
is added atomically, so equal inputs give equal bits. Triton compiles the text of these functions: shapes are powers of
two, whatever is upper case is fixed when compiling, and what lies beyond an edge is masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_HIDDEN = tl.constexpr(-torch.finfo(torch.float32).max / 2)
"""Logit of a pair that a query doesn't see, as :func:`kvenv.attention.causal_bias` makes it: finite."""


@triton.jit
def _logits(left: tl.tensor, right: tl.tensor, visible: tl.tensor, scaling: tl.tensor) -> tl.tensor:
    """Logits of a block of queries and a block of keys, whichever is left."""
    return tl.where(visible, tl.dot(left, right, input_precision="tf32x3") * scaling, _HIDDEN)


@triton.jit
def attend_kernel(
    query: tl.tensor,
    key: tl.tensor,
    reach: tl.tensor,
    held: tl.tensor,
    value: tl.tensor,
    output: tl.tensor,
    highest: tl.tensor,
    mass: tl.tensor,
    scaling: tl.tensor,
    heads: tl.tensor,
    groups: tl.tensor,
    queries: tl.tensor,
    slots: tl.tensor,
    reach_row: tl.tensor,
    held_row: tl.tensor,
    held_head: tl.tensor,
    key_row: tl.tensor,
    key_head: tl.tensor,
    key_slot: tl.tensor,
    value_row: tl.tensor,
    value_head: tl.tensor,
    value_slot: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
) -> None:
    """Attention output of a block of one KV head's queries (all of its group), and their normalisers."""
    kv_head = tl.program_id(0).to(tl.int64)
    row, head = kv_head // heads, kv_head % heads
    asked = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    exists = asked < groups * queries
    dim = tl.arange(0, PADDED_DIM)
    asked_at = kv_head * groups * queries + asked
    query_at = asked_at[:, None] * HEAD_DIM + dim[None, :]
    query_exists = exists[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(query + query_at, mask=query_exists, other=0.0)
    sees_up_to = tl.load(reach + row * reach_row + asked % queries, mask=exists, other=0.0)
    top = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    mixed = tl.zeros((BLOCK_QUERIES, PADDED_DIM), tl.float32)
    for first in range(0, slots, BLOCK_SLOTS):
        slot = first + tl.arange(0, BLOCK_SLOTS)
        inside = slot < slots
        position = tl.load(held + row * held_row + head * held_head + slot, mask=inside, other=float("inf"))
        k = tl.load(
            key + row * key_row + head * key_head + slot[None, :] * key_slot + dim[:, None],
            mask=inside[None, :] & (dim < HEAD_DIM)[:, None],
            other=0.0,
        )
        v = tl.load(
            value + row * value_row + head * value_head + slot[:, None] * value_slot + dim[None, :],
            mask=inside[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        logits = _logits(q, k, position[None, :] <= sees_up_to[:, None], scaling)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        shares = tl.exp(logits - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(shares, axis=1)
        mixed = mixed * shrink[:, None] + tl.dot(shares.to(v.dtype), v, input_precision="tf32x3")
        top = higher
    tl.store(output + query_at, mixed / total[:, None], mask=query_exists)
    tl.store(highest + asked_at, top, mask=exists)
    tl.store(mass + asked_at, total, mask=exists)


@triton.jit
def reduce_kernel(
    query: tl.tensor,
    key: tl.tensor,
    reach: tl.tensor,
    held: tl.tensor,
    weights: tl.tensor,
    highest: tl.tensor,
    mass: tl.tensor,
    received: tl.tensor,
    scaling: tl.tensor,
    heads: tl.tensor,
    groups: tl.tensor,
    queries: tl.tensor,
    slots: tl.tensor,
    members: tl.tensor,
    reach_row: tl.tensor,
    held_row: tl.tensor,
    held_head: tl.tensor,
    key_row: tl.tensor,
    key_head: tl.tensor,
    key_slot: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    SUMS: tl.constexpr,
    EXTREMES: tl.constexpr,
) -> None:
    """What a block of slots receives from the queries of one query head, or of ``members`` heads the largest."""
    merged = tl.program_id(0).to(tl.int64)
    kv_head = merged * members // groups
    row, head = kv_head // heads, kv_head % heads
    slot = tl.program_id(1) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    inside = slot < slots
    dim = tl.arange(0, PADDED_DIM)
    position = tl.load(held + row * held_row + head * held_head + slot, mask=inside, other=float("inf"))
    k = tl.load(
        key + row * key_row + head * key_head + slot[:, None] * key_slot + dim[None, :],
        mask=inside[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    number = tl.arange(0, triton.next_power_of_2(SUMS))
    sums = tl.zeros((BLOCK_SLOTS, triton.next_power_of_2(SUMS)), tl.float32)
    largest = tl.zeros((BLOCK_SLOTS,), tl.float32)
    smallest = tl.full((BLOCK_SLOTS,), 1.0, tl.float32)
    for first in range(0, queries, BLOCK_QUERIES):
        asked = first + tl.arange(0, BLOCK_QUERIES)
        exists = asked < queries
        sees_up_to = tl.load(reach + row * reach_row + asked, mask=exists, other=0.0)
        probabilities = tl.zeros((BLOCK_SLOTS, BLOCK_QUERIES), tl.float32)
        for member in range(members):
            asked_at = (merged * members + member) * queries + asked
            q = tl.load(
                query + asked_at[None, :] * HEAD_DIM + dim[:, None],
                mask=exists[None, :] & (dim < HEAD_DIM)[:, None],
                other=0.0,
            )
            top = tl.load(highest + asked_at, mask=exists, other=0.0)
            total = tl.load(mass + asked_at, mask=exists, other=1.0)
            logits = _logits(k, q, position[:, None] <= sees_up_to[None, :], scaling)
            probabilities = tl.maximum(probabilities, tl.exp(logits - top[None, :]) / total[None, :])
        weights_at = row * SUMS * queries + asked
        for each in tl.static_range(SUMS):
            weight = tl.load(weights + weights_at + each * queries, mask=exists, other=0.0)
            weighted = tl.sum(probabilities * weight[None, :], axis=1)
            sums += tl.where(number[None, :] == each, weighted[:, None], 0.0)
        if EXTREMES:
            counts = (tl.load(weights + weights_at, mask=exists, other=0.0) != 0.0)[None, :]
            largest = tl.maximum(largest, tl.max(tl.where(counts, probabilities, 0.0), axis=1))
            smallest = tl.minimum(smallest, tl.min(tl.where(counts, probabilities, 1.0), axis=1))
    received_at = merged * (SUMS + 2 * EXTREMES) * slots + slot
    tl.store(
        received + received_at[:, None] + number[None, :] * slots,
        sums,
        mask=inside[:, None] & (number < SUMS)[None, :],
    )
    if EXTREMES:
        tl.store(received + received_at + SUMS * slots, largest, mask=inside)
        tl.store(received + received_at + (SUMS + 1) * slots, smallest, mask=inside)
