"""DiT: a transformer on patches, conditioned through adaLN-zero (Peebles and Xie, arXiv 2212.09748).

Shape legend:  B batch   C channels   Y, X image rows and columns   T steps of a sequence   N tokens   D width
               P = C * patch_size^dims patch elements
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmf_fast.models.layers import (
    Attention,
    Conditioning,
    check_positive,
    check_sample,
    linear_flops,
    modulated_norm,
    total_flops,
    zero_init,
)
from mmf_fast.models.recompute import recomputed

__all__ = ["DiT"]

PRESETS: dict[str, dict[str, int]] = {
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "XL": dict(width=1152, depth=28, heads=16),
}


def positions_1d(grid: int, width: int) -> Tensor:
    """Fixed sin-cos positions (grid, width)."""
    frequencies = 10000.0 ** -torch.linspace(0, 1, width // 2 + 1)[:-1]
    angles = torch.arange(grid)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def positions_2d(grid: int, width: int) -> Tensor:
    """Fixed sin-cos positions (grid^2, width): half of the width for rows, half for columns (MAE, arXiv 2111.06377)."""
    axis = positions_1d(grid, width // 2)
    rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


class Block(nn.Module):
    """x <- x + gate * Attention(modulate(LN(x))); x <- x + gate * MLP(modulate(LN(x))).

    Shifts, scales and gates are linear in c and zero at initialisation, so every block starts as the identity.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, dropout: float, recompute: bool = False
    ):
        super().__init__()
        self.recompute = recompute
        hidden = int(width * mlp_ratio)
        self.modulation = zero_init(nn.Linear(width, 6 * width))
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.fc_in = nn.Linear(width, hidden)
        self.fc_out = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        return recomputed(self, self._forward, x_BND, c_BD) if self.recompute else self._forward(x_BND, c_BD)

    def _forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c_BD).unsqueeze(1).chunk(6, dim=-1)
        h_BND = self.attention(modulated_norm(self.norm1, x_BND, shift1, scale1))
        x_BND = x_BND + gate1 * self.dropout(h_BND)
        h_BND = self.fc_out(F.gelu(self.fc_in(modulated_norm(self.norm2, x_BND, shift2, scale2)), approximate="tanh"))
        return x_BND + gate2 * self.dropout(h_BND)

    def flops(self, tokens: int) -> int:
        mlp = linear_flops(self.fc_in, tokens) + linear_flops(self.fc_out, tokens)
        return linear_flops(self.modulation) + self.attention.flops(tokens) + mlp


class DiT(nn.Module):
    """Diffusion transformer u(z, r, t, y) on square images or latents (B, C, Y, X), or on sequences (B, T, C).

    dims: 2 for images, 1 for sequences, such as trajectories and plans, of T states or actions with C numbers each.
    input_size: rows and columns of an image or steps of a sequence, divisible by patch_size.  channels: C.
    width, depth, heads, mlp_ratio: of the transformer; width is divisible by heads and by 2 dims.
    num_classes: 0 for an unconditional network; otherwise labels 0 .. num_classes - 1, num_classes is the null label.
    context_dim: length of a vector that a sample is given, such as a start and a goal; 0 for none.
    guided: the network is told its guidance, which is then chosen at sampling (see Guidance, whose omega is a range).
    qk_norm: RMS norm of queries and keys.  dropout: on both branches of a block.
    recompute: keep only the input of each block for backward and compute the rest again (activation checkpointing).
    Raises ValueError when a size does not fit.
    """

    def __init__(
        self,
        input_size: int,
        channels: int = 3,
        patch_size: int = 4,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        qk_norm: bool = False,
        dropout: float = 0.0,
        recompute: Annotated[bool, "free"] = False,  # see mmf_fast/config.py
        context_dim: int = 0,
        dims: int = 2,
        guided: bool = False,
    ):
        super().__init__()
        check_positive(input_size=input_size, channels=channels, patch_size=patch_size)
        check_positive(width=width, depth=depth, heads=heads, mlp_width=int(width * mlp_ratio))
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not divisible by patch_size {patch_size}")
        if dims not in (1, 2):
            raise ValueError(f"dims is {dims}: 2 for square images, 1 for sequences")
        if width % (2 * dims):
            raise ValueError(f"width {width} is not divisible by {2 * dims}, which the sin-cos positions need")
        self.config = dict(
            name="dit", input_size=input_size, channels=channels, patch_size=patch_size, width=width, depth=depth,
            heads=heads, mlp_ratio=mlp_ratio, num_classes=num_classes, context_dim=context_dim, dims=dims,
            qk_norm=qk_norm, dropout=dropout, recompute=recompute, guided=guided,
        )  # fmt: skip
        self.num_classes, self.dims = num_classes, dims
        self.shape = (input_size, channels) if dims == 1 else (channels, input_size, input_size)
        self.patch_size, self.grid = patch_size, input_size // patch_size
        patch = channels * patch_size**dims
        positions = positions_1d if dims == 1 else positions_2d
        self.register_buffer("positions_ND", positions(self.grid, width), persistent=False)
        self.conditioning = Conditioning(width, num_classes, context_dim, guided)
        self.input = nn.Linear(patch, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qk_norm, dropout, recompute) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, patch)
        self.initialize()

    @classmethod
    def preset(cls, name: str, input_size: int, **arguments: Any) -> DiT:
        """A published size (S, B, L, XL) and a patch size: DiT.preset("B/4", input_size=64). Arguments override."""
        size, _, patch = name.partition("/")
        if size not in PRESETS or not patch.isdecimal():
            nearest = difflib.get_close_matches(size.upper(), PRESETS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown DiT preset {name!r}; give S, B, L or XL and a patch size, such as '{nearest}/2'")
        return cls(input_size, **{"patch_size": int(patch), **PRESETS[size], **arguments})

    def initialize(self) -> None:
        """Xavier-uniform weights and zero biases in the trunk; modulations and the output start at zero."""
        for block in self.blocks:
            for name, layer in block.named_modules():
                if isinstance(layer, nn.Linear) and name != "modulation":
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.input.weight)
        nn.init.zeros_(self.input.bias)
        zero_init(self.modulation)
        zero_init(self.output)

    def forward(
        self, z: Tensor, r: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None, **guidance: Any
    ) -> Tensor:
        """u(z, r, t, y, context, **guidance) -> u like z.

        z (B, C, Y, X) or (B, T, C); r and t (B,) with 0 <= r <= t <= 1; y (B,) int64 or None; context
        (B, context_dim) or None; of a guided network omega, t_min and t_max, each (B,) or a number.
        """
        check_sample(z, self.shape)
        c_BD = self.conditioning(r, t, y, context, **guidance)
        dtype = self.input.weight.dtype
        x_BND = self.input(self.to_patches(z.to(dtype))) + self.positions_ND.to(dtype)  # ZeRO casts parameters alone
        for block in self.blocks:
            x_BND = block(x_BND, c_BD)
        shift, scale = self.modulation(c_BD).unsqueeze(1).chunk(2, dim=-1)
        return self.from_patches(self.output(modulated_norm(self.norm, x_BND, shift, scale))).to(z.dtype)

    def to_patches(self, z: Tensor) -> Tensor:
        """(B, C, Y, X) or (B, T, C) -> (B, N, P)"""
        if self.dims == 1:
            return z.reshape(z.shape[0], self.grid, -1)
        return F.pixel_unshuffle(z, self.patch_size).flatten(2).transpose(1, 2)

    def from_patches(self, patches_BNP: Tensor) -> Tensor:
        """The inverse of `to_patches`."""
        batch = patches_BNP.shape[0]
        if self.dims == 1:
            return patches_BNP.reshape(batch, *self.shape)
        patches_BPYX = patches_BNP.transpose(1, 2).reshape(batch, -1, self.grid, self.grid)
        return F.pixel_shuffle(patches_BPYX, self.patch_size)

    def flops(self, batch: int = 1) -> int:
        """FLOPs of one forward pass: matrix products, 2 per multiply-add."""
        tokens = self.grid**self.dims
        ends = linear_flops(self.input, tokens) + linear_flops(self.modulation) + linear_flops(self.output, tokens)
        return batch * (self.conditioning.flops() + ends + total_flops(self.blocks, tokens))
