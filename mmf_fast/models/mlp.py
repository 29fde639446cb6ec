"""A residual MLP for two-dimensional toys and other vectors.

Shape legend:  B batch   I dimensions of a sample   D width
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmf_fast.models.layers import (
    Conditioning,
    check_positive,
    check_sample,
    linear_flops,
    modulate,
    total_flops,
    zero_init,
)

__all__ = ["MLP"]


class Block(nn.Module):
    """x + W_2 silu(modulate(W_1 silu(x), shift(c), scale(c))), the identity at initialisation."""

    def __init__(self, width: int):
        super().__init__()
        self.fc_in = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.fc_out = zero_init(nn.Linear(width, width))

    def forward(self, x_BD: Tensor, c_BD: Tensor) -> Tensor:
        shift_BD, scale_BD = self.modulation(c_BD).chunk(2, dim=-1)
        h_BD = modulate(self.fc_in(F.silu(x_BD)), shift_BD, scale_BD)
        return x_BD + self.fc_out(F.silu(h_BD))

    def flops(self) -> int:
        return linear_flops(self.fc_in) + linear_flops(self.modulation) + linear_flops(self.fc_out)


class MLP(nn.Module):
    """Residual MLP u(z, r, t, y) on vectors.

    dim: length of a sample.  width, depth: hidden width and number of residual blocks.
    num_classes: 0 for an unconditional network; otherwise labels 0 .. num_classes - 1, num_classes is the null label.
    context_dim: length of a vector that a sample is given, such as a start and a goal; 0 for none.
    guided: the network is told its guidance, which is then chosen at sampling (see Guidance, whose omega is a range).
    Raises ValueError for a size below 1.
    """

    def __init__(
        self,
        dim: int = 2,
        width: int = 256,
        depth: int = 4,
        num_classes: int = 0,
        context_dim: int = 0,
        guided: bool = False,
    ):
        super().__init__()
        check_positive(dim=dim, width=width, depth=depth)
        self.config = dict(
            name="mlp",
            dim=dim,
            width=width,
            depth=depth,
            num_classes=num_classes,
            context_dim=context_dim,
            guided=guided,
        )
        self.num_classes, self.shape = num_classes, (dim,)
        self.conditioning = Conditioning(width, num_classes, context_dim, guided)
        self.input = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.output = zero_init(nn.Linear(width, dim))

    def forward(
        self, z: Tensor, r: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None, **guidance: Any
    ) -> Tensor:
        """u(z, r, t, y, context, **guidance) -> u like z.

        z (B, dim); r and t (B,) with 0 <= r <= t <= 1; y (B,) int64 or None; context (B, context_dim) or None;
        of a guided network omega, t_min and t_max, each (B,) or a number.
        """
        check_sample(z, self.shape)
        c_BD = self.conditioning(r, t, y, context, **guidance)
        x_BD = self.input(z.to(self.input.weight.dtype))
        for block in self.blocks:
            x_BD = block(x_BD, c_BD)
        return self.output(F.silu(x_BD)).to(z.dtype)

    def flops(self, batch: int = 1) -> int:
        """FLOPs of one forward pass: matrix products, 2 per multiply-add."""
        ends = linear_flops(self.input) + linear_flops(self.output)
        return batch * (self.conditioning.flops() + ends + total_flops(self.blocks))
