"""Activations and softmax.

The Jacobian of an elementwise function is diagonal and that of softmax is symmetric, so J dx = J^T dx: PyTorch's fused
backward kernels serve as the tangent. They are differentiable themselves, which SG_lambda needs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmf_fast.forward.dual import Value, register_rule, tangent_scope
from mmf_fast.forward.rules.families import forward_derivative, keeps_tangent, pointwise, rule
from mmf_fast.ops.dispatch import serve
from mmf_fast.ops.pointwise import activation, gelu_tangent, silu_tangent

aten = torch.ops.aten


@pointwise("sigmoid", "expit")
def sigmoid(dx: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return aten.sigmoid_backward(dx, y)


@pointwise("tanh")
def tanh(dx: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return aten.tanh_backward(dx, y)


@pointwise("relu")
def relu(dx: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return aten.threshold_backward(dx, x, 0)


@rule("gelu")
def gelu(input: Value, *, approximate: str = "none") -> tuple[Any, Any]:
    x, dx = input.primal, input.tangent
    act = "gelu" if approximate == "none" else "gelu_tanh"
    if serve("activation", input):
        return activation(x, dx, act, tangent_grad=keeps_tangent(input))
    y = F.gelu(x, approximate=approximate)
    with tangent_scope(input):
        return y, gelu_tangent(dx.to(y.dtype), x.to(y.dtype), approximate)


@rule("silu")
def silu(input: Value) -> tuple[Any, Any]:
    if input.dtype.is_complex:
        return forward_derivative(F.silu, (input,), {})
    x, dx = input.primal, input.tangent
    if serve("activation", input):
        return activation(x, dx, "silu", tangent_grad=keeps_tangent(input))
    y = F.silu(x)
    with tangent_scope(input):
        return y, silu_tangent(dx.to(y.dtype), x.to(y.dtype))


@pointwise("leaky_relu")
def leaky_relu(dx: Tensor, x: Tensor, y: Tensor, negative_slope: float = 0.01) -> Tensor:
    return aten.leaky_relu_backward(dx, x, negative_slope, False)


@pointwise("elu")
def elu(dx: Tensor, x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
    return aten.elu_backward(dx, alpha, 1.0, 1.0, False, x)


@pointwise("softplus")
def softplus(dx: Tensor, x: Tensor, y: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return aten.softplus_backward(dx, x, beta, threshold)


@pointwise("hardsigmoid")
def hardsigmoid(dx: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where((x > -3) & (x < 3), dx / 6, 0.0)


@rule("glu")
def glu(input: Value, dim: int = -1) -> Any:
    a, b = input.chunk(2, dim)
    return a * torch.sigmoid(b)


# -- softmax: d softmax(x) = y * (dx - sum(y * dx)) --------------------------------------------------------------------


@rule("softmax")
def softmax(input: Value, dim: int, *, dtype: torch.dtype | None = None, _stacklevel: int = 3) -> tuple[Any, Any]:
    x = input.primal
    y = torch.softmax(x, dim, dtype=dtype)
    with tangent_scope(input):
        return y, aten._softmax_backward_data(input.tangent.to(y.dtype), y, dim, y.dtype)


@register_rule(aten._safe_softmax.default)
def safe_softmax(self: Value, dim: int, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """softmax, and 0 for rows of -inf alone."""
    y = aten._safe_softmax(self.primal, dim, dtype)
    with tangent_scope(self):
        return y, aten._softmax_backward_data(self.tangent.to(y.dtype), y, dim, y.dtype)


@rule("log_softmax")
def log_softmax(input: Value, dim: int, *, dtype: torch.dtype | None = None, _stacklevel: int = 3) -> tuple[Any, Any]:
    y = torch.log_softmax(input.primal, dim, dtype=dtype)
    with tangent_scope(input):
        dx = input.tangent.to(y.dtype)
        return y, dx - (y.exp() * dx).sum(dim, keepdim=True)
