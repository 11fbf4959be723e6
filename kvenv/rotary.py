"""Rotary position embedding as a function of position, for what must rotate queries elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of a model (RoPE, arXiv 2104.09864, in the half-split layout of Hugging Face models).

    Attributes
    ----------
    inv_freq : Tensor (R/2,)
        Angular frequencies; the first R of D dimensions are rotated.
    scaling : float
        Factor on both cosine and sine (YaRN's attention factor; 1 elsewhere).
    """

    inv_freq: Tensor
    scaling: float = 1.0

    @classmethod
    def of(cls, model: torch.nn.Module) -> Rotary:
        """Return the rotary embedding of a Hugging Face decoder.

        Raises
        ------
        ValueError
            If the model has none.
        """
        for module in model.modules():
            inv_freq, scaling = getattr(module, "inv_freq", None), getattr(module, "attention_scaling", None)
            if isinstance(inv_freq, Tensor) and isinstance(scaling, int | float):
                return cls(inv_freq.float(), float(scaling))
        raise ValueError(f"model {type(model).__name__} has no rotary position embedding: kvenv needs one")

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate vectors from position 0 to ``positions``.

        Parameters
        ----------
        x : Tensor (..., D)
            Vectors without rotary phase.
        positions : Tensor, broadcastable to (...,)
            Where to rotate them to; negative positions rotate back.

        Returns
        -------
        Tensor (..., D)
        """
        angles = positions[..., None].to(self.inv_freq.dtype) * self.inv_freq
        cos, sin = angles.cos().to(x.dtype) * self.scaling, angles.sin().to(x.dtype) * self.scaling
        half = self.inv_freq.shape[0]
        first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate vectors back from ``positions`` to position 0: the inverse of :meth:`rotate`."""
        turned = self.rotate(x, -positions)
        if self.scaling == 1:
            return turned
        rotated = 2 * self.inv_freq.shape[0]
        return torch.cat((turned[..., :rotated] / self.scaling**2, turned[..., rotated:]), dim=-1)
