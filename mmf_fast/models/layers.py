"""What the networks share: modulation, conditioning, attention, initialisation and FLOP counts.

Shape legend:  B batch   N tokens   D width   H heads   K width of a head   F frequencies

Everything here is differentiated in forward mode too (z and t may be `Dual`s), so a forward pass uses torch functions
only and never writes in place. torch.cat is given a list: Dynamo does not look for Duals inside a tuple.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmf_fast.forward.rules.norms import fused_modulated_norm, fused_norm_silu

__all__ = [
    "Attention",
    "Conditioning",
    "check_positive",
    "check_sample",
    "conv_flops",
    "linear_flops",
    "modulate",
    "modulated_norm",
    "norm_silu",
    "sinusoids",
    "total_flops",
    "zero_init",
]

Layer = TypeVar("Layer", bound=nn.Module)

FREQUENCIES = 128  # of the embedding of a time
HIGHEST = 2.0  # angular frequency among them, see `sinusoids`


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) x + shift, the scale-shift conditioning of FiLM, ADM and adaLN. shift and scale broadcast to x."""
    return x * (1 + scale) + shift


def modulated_norm(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """modulate(norm(x), shift, scale), which is one operator on Duals where there is a fused one."""
    y = fused_modulated_norm(norm, x, shift, scale)
    return modulate(norm(x), shift, scale) if y is None else y


def norm_silu(norm: nn.Module, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """silu(norm(x)), modulated before the activation where shift and scale are given; as `modulated_norm`."""
    y = fused_norm_silu(norm, x, shift, scale)
    if y is not None:
        return y
    y = norm(x)
    return F.silu(y if shift is None or scale is None else modulate(y, shift, scale))


def sinusoids(t: Tensor, count: int, highest: float = HIGHEST) -> Tensor:
    """[sin(w_j t), cos(w_j t)] with w_j spaced geometrically from 1 to `highest`: (...,) -> (..., 2 * count).

    MeanFlow regresses on d_t u, which grows with the frequencies of the embedding. Diffusion code multiplies t in
    [0, 1] by 1000: neighbouring times then look unrelated, d_t u is of order 1000 and training diverges. On the digits,
    a highest frequency of 16 still left the error of the intervals twice as large as 2 does (lambda = 0, conditional
    tangents), and one-step samples of two moons farther from the data at every step looked at.
    The result has at least float32 precision whatever the dtype of t.
    """
    dtype = torch.promote_types(t.dtype, torch.float32)
    exponents_F = torch.linspace(0, 1, count, dtype=dtype, device=t.device)
    angles_BF = t.to(dtype).unsqueeze(-1) * torch.exp(math.log(highest) * exponents_F)
    return torch.cat([angles_BF.sin(), angles_BF.cos()], dim=-1)


class Conditioning(nn.Module):
    """c = silu(MLP([sinusoids(t), sinusoids(t - r)]) + E[y] + MLP([context, g])), by which every block is modulated.

    r, t (B,) float32, y (B,) of any integer dtype, context (B, context_dim) -> c (B, width) in the dtype of the
    weights. The interval t - r is embedded itself, because the network must tell r = t (velocity) from r < t (average
    velocity) sharply. The sinusoids and their tangents are float32 also in a bfloat16 network: the cast comes after
    them.

    Class labels are 0 .. num_classes - 1; num_classes is the null label, and y = None means all null. The context is a
    vector of numbers that a sample is given (a start, a goal, an observation); without it there is nothing to predict.

    guided: the network is told its guidance, g = (1 - 1 / omega, t_min, t_max), each a tensor (B,) or a number; by
    default omega = 1, which is no guidance, in [0, 1] (improved MeanFlow, arXiv 2512.02012).
    """

    def __init__(self, width: int, num_classes: int = 0, context_dim: int = 0, guided: bool = False):
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (unconditional) or more, got {num_classes}")
        if context_dim < 0:
            raise ValueError(f"context_dim must be 0 (no context) or more, got {context_dim}")
        self.num_classes = num_classes
        self.fc_in = nn.Linear(4 * FREQUENCIES, width)
        self.fc_out = nn.Linear(width, width)
        # Its weights have deviation 1, as in ADM. DiT's 0.02 is hardly heard beside the times: after 500 steps on the
        # digits one-step samples then have the class asked for in 56 % of cases, for 97 %.
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.context_dim, self.guided = context_dim, guided
        numbers = context_dim + (3 if guided else 0)
        given = (nn.Linear(numbers, width), nn.SiLU(), nn.Linear(width, width)) if numbers else ()
        self.context = nn.Sequential(*given)

    def forward(
        self,
        r: Tensor,
        t: Tensor,
        y: Tensor | None,
        context: Tensor | None = None,
        omega: Tensor | float | None = None,
        t_min: Tensor | float | None = None,
        t_max: Tensor | float | None = None,
    ) -> Tensor:
        times_B4F = torch.cat([sinusoids(time, FREQUENCIES) for time in (t, t - r)], dim=-1)
        c_BD = self.fc_out(F.silu(self.fc_in(times_B4F.to(self.fc_in.weight.dtype))))
        if self.label is not None:
            if y is None:
                y = torch.full(t.shape, self.num_classes, device=t.device)
            if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool:
                kind = y.dtype if isinstance(y, Tensor) else f"a {type(y).__name__}"
                raise ValueError(f"labels y are {kind}: give class numbers 0 .. {self.num_classes - 1} as integers")
            c_BD = c_BD + self.label(y.long())
        elif y is not None:
            raise ValueError("an unconditional network was given labels; pass y=None or build it with num_classes > 0")
        numbers = []
        if self.context_dim:
            if context is None or context.shape[1:] != (self.context_dim,):
                given = "none" if context is None else f"{tuple(context.shape)}"
                raise ValueError(f"the network takes context=, of shape (B, {self.context_dim}); it was given {given}")
            numbers.append(context)
        elif context is not None:
            raise ValueError("a network without context was given one; build it with context_dim > 0")
        if self.guided:
            numbers.append(guidance_numbers(t, omega, t_min, t_max))
        elif not (omega is t_min is t_max is None):
            raise ValueError("a network that is not told its guidance was given one; build it with guided=True")
        if numbers:
            dtype = self.fc_in.weight.dtype
            c_BD = c_BD + self.context(torch.cat([given_BK.to(dtype) for given_BK in numbers], dim=-1))
        return F.silu(c_BD)

    def flops(self) -> int:
        layers = [self.fc_in, self.fc_out, *self.context]
        return sum(linear_flops(layer) for layer in layers if isinstance(layer, nn.Linear))


def guidance_numbers(
    t: Tensor, omega: Tensor | float | None, t_min: Tensor | float | None, t_max: Tensor | float | None
) -> Tensor:
    """(1 - 1 / omega, t_min, t_max), all in [0, 1]: (B, 3) of at least float32, for the B times t."""
    dtype = torch.promote_types(t.dtype, torch.float32)

    def rows(value: Tensor | float | None, default: float) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(t.device, dtype).expand(t.shape)
        number = default if value is None else value
        return torch.full(t.shape, number, dtype=dtype, device=t.device)  # made there: a copy would wait for a GPU

    return torch.stack([1 - 1 / rows(omega, 1.0), rows(t_min, 0.0), rows(t_max, 1.0)], dim=-1)


class HeadNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x is bfloat16 and the weight float32; the fused kernel wants them alike.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v over all tokens, H heads: (B, N, D) -> (B, N, D).

    qk_norm: divide queries and keys by their root mean square per head, which bounds the logits in bfloat16
    (ViT-22B, arXiv 2302.05442, section 2).
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}")
        self.heads, self.width = heads, width
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = HeadNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x_BND: Tensor) -> Tensor:
        qkv_3BHNK = self.qkv(x_BND).reshape(*x_BND.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q_BHNK, k_BHNK, v_BHNK = qkv_3BHNK.unbind(0)
        o_BHNK = F.scaled_dot_product_attention(self.q_norm(q_BHNK), self.k_norm(k_BHNK), v_BHNK)
        return self.out(o_BHNK.transpose(1, 2).flatten(-2))

    def flops(self, tokens: int) -> int:
        """Projections 2 * 4 N D^2, and q k^T and P v with 2 N^2 D each."""
        return linear_flops(self.qkv, tokens) + linear_flops(self.out, tokens) + 4 * tokens**2 * self.width


def zero_init(layer: Layer) -> Layer:
    """Set all parameters of a layer to zero, so that its branch starts as the identity (or the output as 0)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def linear_flops(layer: nn.Linear, rows: int = 1) -> int:
    """2 per multiply-add; bias, normalisation and activations are not counted (as in torch's FlopCounterMode)."""
    return 2 * rows * layer.in_features * layer.out_features


def conv_flops(layer: nn.Conv2d, size: int) -> int:
    """FLOPs of a convolution with a size x size result."""
    return 2 * size**2 * layer.out_channels * layer.in_channels * math.prod(layer.kernel_size)


def total_flops(layers: Iterable[Any], *sizes: int) -> int:
    return sum(layer.flops(*sizes) for layer in layers)


def check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_sample(z: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(z.shape[1:]) != shape:
        raise ValueError(f"the network was built for samples of shape {shape}, got {tuple(z.shape[1:])}")
