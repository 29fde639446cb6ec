"""UNet: residual convolutions with skips across the resolutions (DDPM++, arXiv 2011.13456; ADM, arXiv 2105.05233).

Shape legend:  B batch   C channels   Y, X rows and columns at the current resolution   N = Y X   D width of c
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmf_fast.models.layers import (
    Attention,
    Conditioning,
    check_positive,
    check_sample,
    conv_flops,
    linear_flops,
    norm_silu,
    total_flops,
    zero_init,
)
from mmf_fast.models.recompute import recomputed

__all__ = ["UNet"]


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups of at least 4 channels."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels, eps=1e-6)


class SpatialAttention(nn.Module):
    """x + Attention(GN(x)) over all positions, the identity at initialisation: (B, C, Y, X) -> (B, C, Y, X)."""

    def __init__(self, channels: int, heads: int, size: int):
        super().__init__()
        self.size = size
        self.norm = group_norm(channels)
        self.attention = Attention(channels, heads)
        zero_init(self.attention.out)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        h_BNC = self.attention(self.norm(x_BCYX).flatten(2).transpose(1, 2))
        return x_BCYX + h_BNC.transpose(1, 2).reshape(x_BCYX.shape)

    def flops(self) -> int:
        return self.attention.flops(self.size**2)


class ResBlock(nn.Module):
    """skip(x) + conv_2(silu(modulate(GN(conv_1(silu(GN(x)))), shift(c), scale(c)))), then attention if heads > 0.

    The convolution conv_2 starts at zero. skip is the identity, or 1x1 where the number of channels changes. On the way
    up x is followed by the channels of an earlier result.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        width: int,
        size: int,
        heads: int,
        dropout: float,
        recompute: bool = False,
    ):
        super().__init__()
        self.size, self.recompute = size, recompute
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * channels)
        self.norm2 = group_norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else None
        self.attention = SpatialAttention(channels, heads, size) if heads else None

    def forward(self, x_BCYX: Tensor, c_BD: Tensor, *earlier_BCYX: Tensor) -> Tensor:
        inputs = (x_BCYX, c_BD, *earlier_BCYX)
        return recomputed(self, self._forward, *inputs) if self.recompute else self._forward(*inputs)

    def _forward(self, x_BCYX: Tensor, c_BD: Tensor, *earlier_BCYX: Tensor) -> Tensor:
        if earlier_BCYX:
            x_BCYX = torch.cat([x_BCYX, *earlier_BCYX], dim=1)
        shift, scale = self.modulation(c_BD).unsqueeze(-1).unsqueeze(-1).chunk(2, dim=1)
        h_BCYX = self.conv1(norm_silu(self.norm1, x_BCYX))
        h_BCYX = self.conv2(self.dropout(norm_silu(self.norm2, h_BCYX, shift, scale)))
        x_BCYX = h_BCYX + (x_BCYX if self.skip is None else self.skip(x_BCYX))
        return x_BCYX if self.attention is None else self.attention(x_BCYX)

    def flops(self) -> int:
        convolutions = [self.conv1, self.conv2] + ([self.skip] if self.skip is not None else [])
        attention = self.attention.flops() if self.attention is not None else 0
        return sum(conv_flops(conv, self.size) for conv in convolutions) + linear_flops(self.modulation) + attention


class Resample(nn.Module):
    """Half the resolution (3x3 convolution of stride 2) or twice (nearest neighbour, then a 3x3 convolution).

    c is not used; it lets the network call all its layers alike.
    """

    def __init__(self, channels: int, size: int, up: bool):
        super().__init__()
        self.size, self.up = size, up  # size of the result
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1)

    def forward(self, x_BCYX: Tensor, c_BD: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCYX, scale_factor=2.0, mode="nearest") if self.up else x_BCYX)

    def flops(self) -> int:
        return conv_flops(self.conv, self.size)


class UNet(nn.Module):
    """UNet u(z, r, t, y) on square images.

    input_size: rows and columns, divisible by 2^(len(channel_mults) - 1).  channels: of an image.
    base_channels, channel_mults: level i has base_channels * channel_mults[i] channels at input_size / 2^i.
    blocks: residual blocks per level on the way down (one more on the way up).
    attention_resolutions: sizes in pixels at which blocks attend, with `heads` heads; unless it is empty, the middle
    of the network attends too.  dropout: within residual blocks.
    num_classes: 0 for an unconditional network; otherwise labels 0 .. num_classes - 1, num_classes is the null label.
    context_dim: length of a vector that a sample is given, such as a start and a goal; 0 for none.
    guided: the network is told its guidance, which is then chosen at sampling (see Guidance, whose omega is a range).
    recompute: keep only the inputs of residual blocks for backward and compute the rest again (activation
    checkpointing).
    Raises ValueError when a size does not fit, or a resolution never occurs.
    """

    def __init__(
        self,
        input_size: int,
        channels: int = 3,
        base_channels: int = 128,
        channel_mults: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        heads: int = 4,
        num_classes: int = 0,
        dropout: float = 0.0,
        recompute: Annotated[bool, "free"] = False,  # see mmf_fast/config.py
        context_dim: int = 0,
        guided: bool = False,
    ):
        super().__init__()
        check_positive(input_size=input_size, channels=channels, blocks=blocks, heads=heads)
        check_positive(levels=len(channel_mults), channel_mults=min(channel_mults, default=1))
        if base_channels < 4 or base_channels % 4:
            raise ValueError(f"base_channels {base_channels} is not a positive multiple of 4, which group norm needs")
        reduction = 2 ** (len(channel_mults) - 1)
        if input_size % reduction:
            raise ValueError(
                f"input_size {input_size} is not divisible by {reduction}, which {len(channel_mults)} levels need"
            )
        sizes = [input_size // 2**level for level in range(len(channel_mults))]
        levels = [
            (size, base_channels * multiplier, size in attention_resolutions)
            for size, multiplier in zip(sizes, channel_mults, strict=True)
        ]
        for resolution in attention_resolutions:
            if resolution not in sizes:
                raise ValueError(f"attention resolution {resolution} never occurs; this network has {sizes}")
        self.config = dict(
            name="unet", input_size=input_size, channels=channels, base_channels=base_channels,
            channel_mults=list(channel_mults), blocks=blocks, attention_resolutions=list(attention_resolutions),
            heads=heads, num_classes=num_classes, context_dim=context_dim, dropout=dropout, recompute=recompute,
            guided=guided,
        )  # fmt: skip
        self.num_classes, self.shape = num_classes, (channels, input_size, input_size)
        width = 4 * base_channels
        self.conditioning = Conditioning(width, num_classes, context_dim, guided)
        self.input = nn.Conv2d(channels, base_channels, 3, padding=1)

        def block(channels_in: int, channels_out: int, size: int, attend: bool) -> ResBlock:
            return ResBlock(channels_in, channels_out, width, size, heads if attend else 0, dropout, recompute)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        current, skips = base_channels, [base_channels]  # channels of x and of the results kept for the way up
        for level, (size, out, attend) in enumerate(levels):
            if level:
                self.down.append(Resample(current, size, up=False))
                skips.append(current)
            for _ in range(blocks):
                self.down.append(block(current, out, size, attend))
                current = out
                skips.append(current)
        self.middle = nn.ModuleList(
            block(current, current, sizes[-1], attend) for attend in (len(attention_resolutions) > 0, False)
        )
        for level, (size, out, attend) in reversed(list(enumerate(levels))):
            for _ in range(blocks + 1):
                self.up.append(block(current + skips.pop(), out, size, attend))
                current = out
            if level:
                self.up.append(Resample(current, sizes[level - 1], up=True))
        self.norm = group_norm(current)
        self.output = zero_init(nn.Conv2d(current, channels, 3, padding=1))

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """In the order of their calls: what is compiled and sharded one by one, as the list of this name in DiT."""
        return (*self.down, *self.middle, *self.up)

    def forward(
        self, z: Tensor, r: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None, **guidance: Any
    ) -> Tensor:
        """u(z, r, t, y, context, **guidance) -> u like z.

        z (B, C, Y, X); r and t (B,) with 0 <= r <= t <= 1; y (B,) int64 or None; context (B, context_dim) or None;
        of a guided network omega, t_min and t_max, each (B,) or a number.
        """
        check_sample(z, self.shape)
        c_BD = self.conditioning(r, t, y, context, **guidance)
        x_BCYX = self.input(z.to(self.input.weight.dtype))
        skips = [x_BCYX]
        for layer in self.down:
            x_BCYX = layer(x_BCYX, c_BD)
            skips.append(x_BCYX)
        for layer in self.middle:
            x_BCYX = layer(x_BCYX, c_BD)
        for layer in self.up:
            earlier = [skips.pop()] if isinstance(layer, ResBlock) else []
            x_BCYX = layer(x_BCYX, c_BD, *earlier)
        return self.output(norm_silu(self.norm, x_BCYX)).to(z.dtype)

    def flops(self, batch: int = 1) -> int:
        """FLOPs of one forward pass: matrix products and convolutions, 2 per multiply-add."""
        size = self.shape[-1]
        ends = conv_flops(self.input, size) + conv_flops(self.output, size)
        trunk = total_flops(self.blocks)
        return batch * (self.conditioning.flops() + ends + trunk)
