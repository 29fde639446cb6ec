"""The tangents of smooth activations, with a backward of their own.

    y' = f'(x) x';       for a cotangent h of y':   g_x' = f'(x) h,   g_x = f''(x) x' h

PyTorch has fused kernels for f' (they are the backward of f) but builds f'' from dozens of passes, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["gelu_tangent", "silu_tangent"]

aten = torch.ops.aten


def silu_tangent(dx: Tensor, x: Tensor) -> Tensor:
    """f = x s with s = sigmoid(x);  f'' = s (1 - s) (2 + x (1 - 2 s))."""
    return _tangent(dx, x, aten.silu_backward, _silu_curvature)


def gelu_tangent(dx: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """f = x Phi(x) with f'' = phi(x) (2 - x^2), or its tanh approximation (see `_gelu_tanh_curvature`)."""
    if approximate == "none":
        return _tangent(dx, x, aten.gelu_backward, _gelu_curvature)
    return _tangent(dx, x, _gelu_tanh_slope, _gelu_tanh_curvature)


def _tangent(dx: Tensor, x: Tensor, slope: Callable[..., Tensor], curvature: Callable[[Tensor], Tensor]) -> Tensor:
    return _Tangent.apply(dx, x, slope, curvature) if torch.is_grad_enabled() else slope(dx, x)


class _Tangent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dx: Tensor, x: Tensor, slope: Callable[..., Tensor], curvature: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(dx, x)
        ctx.slope, ctx.curvature = slope, curvature
        return slope(dx, x)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        dx, x = ctx.saved_tensors
        return ctx.slope(h, x), ctx.curvature(x) * dx * h, None, None


def _silu_curvature(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return aten.sigmoid_backward(2 + x * (1 - 2 * s), s)


def _gelu_curvature(x: Tensor) -> Tensor:
    x2 = x * x
    return torch.exp(-0.5 * x2) * (2 - x2) * (1 / math.sqrt(2 * math.pi))


def _gelu_tanh_slope(v: Tensor, x: Tensor) -> Tensor:
    return aten.gelu_backward(v, x, approximate="tanh")


def _gelu_tanh_curvature(x: Tensor) -> Tensor:
    """f = x (1 + T) / 2, T = tanh(k (x + a x^3)), w = k (1 + 3 a x^2);  f'' = (1 - T^2) (w + x (3 a k x - T w^2))."""
    k, a = math.sqrt(2 / math.pi), 0.044715
    x2 = x * x
    w = k + (3 * a * k) * x2
    tanh = torch.tanh(x * (k + (a * k) * x2))
    return aten.tanh_backward(w + x * (3 * a * k * x - tanh * w * w), tanh)
