"""Expected Attention: "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
Distribution" (arXiv 2510.00636).

Future queries are taken as Gaussian, with the moments of past queries before rotation, turned by the average of the
rotations R_t of the next 512 positions:

    R = mean of R_t,  m = R mean,  S = R cov R^T
    e_i = mean over the group of softmax_i(m.k_i / sqrt(d) + k_i^T S k_i / (2 d))
    priority_i = e_i * ||v_i||

Adapted: moments are of the queries themselves as the cache saw them, not derived from those of the hidden states, which
makes the method apply to models with normalised queries (Qwen3), too. The paper weighs by the norm of the value after
the output projection, which a policy does not see; as in the released code it is ||v||, without the additive constant
on the attention. Softmax is over the filled slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.base import Policy, needed, precise, softmax_over
from kvenv.rotary import Rotary
from kvenv.state import LayerState


class ExpectedAttention(Policy):
    """What the expected future query attends to least, weighted by the value's norm, goes first."""

    name = "expected-attention"
    needs = frozenset({"query_moments"})
    future_positions = 512

    def __call__(self, state: LayerState) -> Tensor:
        """Return priorities (N, H, C)."""
        if state.rotary is None:
            raise ValueError("the policy reads state.rotary, which is None: name 'query_moments' in its `needs`")
        keys, values = precise(state.keys), precise(state.values)
        # Garbage in empty slots could overflow in the quadratic form.
        keys = keys.masked_fill(~state.filled[..., None], 0)
        mean, cov = needed(state, "query_mean").to(keys.dtype), needed(state, "query_cov").to(keys.dtype)
        steps = torch.arange(self.future_positions, device=keys.device)
        rotation = mean_rotation(state.rotary, state.next_position[:, None] + steps, keys.shape[-1]).to(keys.dtype)
        mean = torch.einsum("nij,nhgj->nhgi", rotation, mean)
        cov = torch.einsum("nij,nhgjk,nlk->nhgil", rotation, cov, rotation)

        size = keys.shape[-1]
        first = torch.einsum("nhgd,nhcd->nhgc", mean, keys) / size**0.5
        second = torch.einsum("nhcd,nhgde,nhce->nhgc", keys, cov, keys) / (2 * size)
        expected = softmax_over(first + second, state.filled[:, :, None, :]).mean(2)
        return expected * values.norm(dim=-1)


def mean_rotation(rotary: Rotary, positions: Tensor, size: int) -> Tensor:
    """Return the average of the rotation matrices at ``positions`` (N, n): (N, size, size), acting on columns."""
    angles = positions[..., None].to(rotary.inv_freq.dtype) * rotary.inv_freq
    cos, sin = angles.cos().mean(1).diag_embed(), angles.sin().mean(1).diag_embed()
    turned = torch.cat((torch.cat((cos, -sin), -1), torch.cat((sin, cos), -1)), -2) * rotary.scaling
    matrix = torch.eye(size, dtype=cos.dtype, device=cos.device).repeat(len(positions), 1, 1)
    matrix[:, : turned.shape[-1], : turned.shape[-1]] = turned
    return matrix
