"""The tangent of layer norm without parameters, with a backward of its own.

    x^ = (x - mean) r,   r = 1 / sqrt(var + eps),   J = r (I - 1 1^T / D - x^ x^^T / D)  (symmetric),   x^' = J x'

For a cotangent h of x^', with means over the D normalised elements:

    g_x' = J h
    g_x  = -r (mean(x^ x') J h + mean(x^ h) x^' + mean(h x^') x^)

J applied to a vector is PyTorch's fused layer-norm backward. Checked against autograd of the composition in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["layer_norm_tangent"]


def layer_norm_tangent(x: Tensor, dx: Tensor, shape: Sequence[int], eps: float) -> Tensor:
    """x^' over the trailing dimensions `shape` of x and dx (..., *shape), differentiable in both."""
    x_hat, mean, r = torch.native_layer_norm(x, shape, None, None, eps)
    if torch.is_grad_enabled():
        return _LayerNormTangent.apply(x, dx, x_hat, mean, r, list(shape))
    return _jacobian(dx, x, shape, mean, r)


def _jacobian(v: Tensor, x: Tensor, shape: Sequence[int], mean: Tensor, r: Tensor) -> Tensor:
    return torch.ops.aten.native_layer_norm_backward(v, x, shape, mean, r, None, None, [True, False, False])[0]


class _LayerNormTangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dx: Tensor, x_hat: Tensor, mean: Tensor, r: Tensor, shape: list[int]) -> Tensor:
        d_hat = _jacobian(dx, x, shape, mean, r)
        ctx.save_for_backward(x, dx, x_hat, mean, r, d_hat)
        ctx.shape = shape
        return d_hat

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        x, dx, x_hat, mean, r, d_hat = ctx.saved_tensors
        dims = tuple(range(-len(ctx.shape), 0))

        def average(a: Tensor, b: Tensor) -> Tensor:
            return r * (a * b).mean(dims, keepdim=True)

        g_dx = _jacobian(h, x, ctx.shape, mean, r)
        g_x = -(average(x_hat, dx) * g_dx).addcmul(average(x_hat, h), d_hat).addcmul(average(h, d_hat), x_hat)
        return g_x, g_dx, None, None, None, None
