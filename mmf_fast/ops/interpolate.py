"""The point and the velocity of the straight path, from images as they are stored.

z_t = (1 - t) x + t noise = x + t v,   v = noise - x,   x = uint8 / 127.5 - 1 for stored bytes
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmf_fast.ops import reference
from mmf_fast.ops.arguments import Arguments
from mmf_fast.ops.dispatch import define
from mmf_fast.ops.gpu import jit, tl, triton

__all__ = ["interpolate"]


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(z_t, v), each like noise, in one pass. Not differentiable: data have no gradient.

    x: (B, ...) uint8 (0 to 255) or floating-point in [-1, 1]. noise: like x, floating-point. t: (B,) in [0, 1].
    Raises ValueError for shapes that do not fit.
    """
    if x.shape != noise.shape or t.shape != x.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)}, noise {tuple(noise.shape)}, t {tuple(t.shape)}: need x = noise, t (B,)")
    rows = (a.detach().reshape(len(a), math.prod(x.shape[1:])).contiguous() for a in (x, noise))
    z, v = _operator(*rows, t.detach().contiguous())
    return z.view(noise.shape), v.view(noise.shape)


@jit
def kernel(x_ptr, noise_ptr, t_ptr, z_ptr, v_ptr, K, BYTES: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < K
    at = tl.program_id(0).to(tl.int64) * K + offset
    wide: tl.constexpr = tl.float64 if noise_ptr.dtype.element_ty == tl.float64 else tl.float32
    x = tl.load(x_ptr + at, mask=inside, other=0).to(wide)
    if BYTES:
        x = x / 127.5 - 1.0
    v = tl.load(noise_ptr + at, mask=inside, other=0.0).to(wide) - x
    tl.store(z_ptr + at, (x + tl.load(t_ptr + tl.program_id(0)).to(wide) * v).to(z_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=inside)


def _triton(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    z, v = torch.empty_like(noise), torch.empty_like(noise)
    if x.numel():
        block = min(triton.next_power_of_2(x.shape[1]), 4096)
        grid = (len(x), triton.cdiv(x.shape[1], block))
        kernel[grid](x, noise, t, z, v, x.shape[1], BYTES=x.dtype == torch.uint8, BLOCK=block, num_warps=8)
    return z, v


def _fake(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Any, Any]:
    return torch.empty_like(noise), torch.empty_like(noise)


def _check(x: Tensor, noise: Tensor, t: Tensor) -> None:
    arguments = Arguments("interpolate", noise, dimensions=2)
    arguments.holds(x.is_floating_point() or x.dtype == torch.uint8, f"x is {x.dtype}, not floating-point nor uint8")
    arguments.tensors(noise.shape, x.dtype, contiguous=True, x=x)
    arguments.tensors(noise.shape, contiguous=True, noise=noise)
    arguments.holds(t.is_floating_point(), f"t is {t.dtype}, it must be floating-point")
    arguments.tensors(noise.shape[:1], t.dtype, contiguous=True, t=t)


_operator = define(
    "interpolate(Tensor x, Tensor noise, Tensor t) -> (Tensor, Tensor)",
    reference.interpolate,
    _fake,
    _triton,
    check=_check,
)
