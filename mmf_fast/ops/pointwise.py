"""Smooth activations and their tangents.

    y = f(x),   y' = f'(x) x';       for cotangents g of y and h of y':   g_x = f'(x) g + f''(x) x' h,   g_x' = f'(x) h

`activation` is one kernel forward and one backward. PyTorch has fused kernels for f' (they are the backward of f) but
builds f'' from dozens of passes, or not at all; `gelu_tangent` and `silu_tangent` are composed of them, for
torch.compile to fuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmf_fast.ops import reference
from mmf_fast.ops.arguments import Arguments
from mmf_fast.ops.dispatch import define, layout_of
from mmf_fast.ops.gpu import jit, tl, triton

__all__ = ["activation", "gelu_tangent", "silu_tangent"]

aten = torch.ops.aten


def activation(x: Tensor, dx: Tensor, act: str, *, tangent_grad: bool = True) -> tuple[Tensor, Tensor]:
    """(f(x), f'(x) dx), differentiable in x and dx, which are alike, of any shape.

    act: "silu", "gelu" (erf) or "gelu_tanh". tangent_grad=False detaches the tangent and keeps nothing for it.
    """
    x = layout_of(x)
    y, dy = _operator(x, layout_of(dx, x), act, tangent_grad)
    return y, dy if tangent_grad else dy.detach()


# -- Triton ------------------------------------------------------------------------------------------------------------


@jit
def value_and_slopes(x, ACT: tl.constexpr):
    """f, f', f''; see reference.value_and_slopes."""
    if ACT == "none":
        value, slope, curvature = x, x * 0.0 + 1.0, x * 0.0
    elif ACT == "gelu":
        near = tl.minimum(tl.maximum(x, -40.0), 40.0)
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        pdf = 0.3989422804014327 * tl.exp(-0.5 * near * near)
        value, slope, curvature = x * cdf, cdf + near * pdf, pdf * (2.0 - near * near)
    else:
        if ACT == "silu":
            near, q, q1, q2 = x, x, x * 0.0 + 1.0, x * 0.0
        else:
            near = tl.minimum(tl.maximum(x, -25.0), 25.0)
            q = 1.5957691216057308 * near * (1.0 + 0.044715 * near * near)
            q1 = 1.5957691216057308 * (1.0 + 0.134145 * near * near)
            q2 = 1.5957691216057308 * 0.26829 * near
        s = 1.0 / (1.0 + tl.exp(-q))
        ss = s * (1.0 - s)
        value, slope = x * s, s + near * ss * q1
        curvature = ss * (2.0 * q1 + near * ((1.0 - 2.0 * s) * q1 * q1 + q2))
    return value, slope, curvature


@jit
def activation_kernel(x_ptr, dx_ptr, y_ptr, dy_ptr, size, ACT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    value, slope, _ = value_and_slopes(tl.load(x_ptr + at, mask=inside, other=0.0).to(wide), ACT)
    dx = tl.load(dx_ptr + at, mask=inside, other=0.0).to(wide)
    tl.store(y_ptr + at, value.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(dy_ptr + at, (slope * dx).to(dy_ptr.dtype.element_ty), mask=inside)


@jit
def activation_backward_kernel(
    g_ptr, h_ptr, x_ptr, dx_ptr, g_x_ptr, g_dx_ptr, size, HAS_G: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    _, slope, curvature = value_and_slopes(tl.load(x_ptr + at, mask=inside, other=0.0).to(wide), ACT)
    h = tl.load(h_ptr + at, mask=inside, other=0.0).to(wide)
    g_x = curvature * tl.load(dx_ptr + at, mask=inside, other=0.0).to(wide) * h
    if HAS_G:
        g_x += slope * tl.load(g_ptr + at, mask=inside, other=0.0).to(wide)
    tl.store(g_x_ptr + at, g_x.to(g_x_ptr.dtype.element_ty), mask=inside)
    tl.store(g_dx_ptr + at, (slope * h).to(g_dx_ptr.dtype.element_ty), mask=inside)


BLOCK = 1024


def _forward_triton(x: Tensor, dx: Tensor, act: str, tangent_grad: bool) -> tuple[Tensor, Tensor]:
    y, dy = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        activation_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, dx, y, dy, x.numel(), ACT=act, BLOCK=BLOCK)
    return y, dy


def _backward_triton(g: Tensor | None, h: Tensor, x: Tensor, dx: Tensor, act: str) -> tuple[Tensor, Tensor]:
    g_x, g_dx = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        activation_backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            g, h, x, dx, g_x, g_dx, x.numel(), HAS_G=g is not None, ACT=act, BLOCK=BLOCK
        )
    return g_x, g_dx


# -- registration ------------------------------------------------------------------------------------------------------

ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh")


def check_activation(arguments: Arguments, act: str) -> None:
    arguments.holds(act in ACTIVATIONS, f"unknown activation {act!r}: choose one of {', '.join(ACTIVATIONS)}")


def _check(x: Tensor, dx: Tensor, act: str, *_: Any) -> None:
    _check_backward(None, x, x, dx, act)


def _check_backward(g: Any, h: Tensor, x: Tensor, dx: Tensor, act: str) -> None:
    arguments = Arguments("activation", x)
    check_activation(arguments, act)
    arguments.like(dx=dx, g=g, h=h)


_operator = define(
    "activation(Tensor x, Tensor dx, str act, bool tangent_grad) -> (Tensor, Tensor)",
    reference.activation,
    lambda x, *_: (torch.empty_like(x), torch.empty_like(x)),
    _forward_triton,
    check=_check,
)
_backward_operator = define(
    "activation_backward(Tensor? g, Tensor h, Tensor x, Tensor dx, str act) -> (Tensor, Tensor)",
    reference.activation_backward,
    lambda g, h, x, *_: (torch.empty_like(x), torch.empty_like(x)),
    _backward_triton,
    check=_check_backward,
)


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, dx, ctx.act, ctx.tangent_grad = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(x, dx) if ctx.tangent_grad else (x,))


def _backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple:
    x, *tangents = ctx.saved_tensors
    if not ctx.tangent_grad or h is None:
        return None if g is None else _slope(g, x, ctx.act), None, None, None
    g = None if g is None else layout_of(g, x)
    return *_backward_operator(g, layout_of(h, x), x, *tangents, ctx.act), None, None


_operator.differentiate(_backward, _setup)


def _slope(v: Tensor, x: Tensor, act: str) -> Tensor:
    """f'(x) v by PyTorch's kernels."""
    if act == "silu":
        return aten.silu_backward(v, x)
    return aten.gelu_backward(v, x, approximate="tanh" if act == "gelu_tanh" else "none")


# -- the tangents alone, composed of PyTorch's kernels: what torch.compile traces --------------------------------------


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
    generate_vmap_rule = True

    @staticmethod
    def forward(dx: Tensor, x: Tensor, slope: Callable[..., Tensor], curvature: Callable[[Tensor], Tensor]) -> Tensor:
        return slope(dx, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        dx, x, ctx.slope, ctx.curvature = inputs
        ctx.save_for_backward(dx, x)

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
