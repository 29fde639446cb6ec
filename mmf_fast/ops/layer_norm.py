"""Layer norm and RMS norm with gain and bias (affine, or adaLN's 1 + scale and shift), and their tangents.

    x^ = (x - mean) r,   r = 1 / sqrt(var + eps),   J = r (I - 1 1^T / D - x^ x^^T / D)  (symmetric),   x^' = J x'
    y = x^ a + b,        y' = x^' a + x^ a' + b'

For cotangents g of y and h of y', with G = g a + h a', H = h a and means over the D normalised elements:

    g_x' = J H
    g_x  = J G - r (mean(x^ x') J H + mean(x^ H) x^' + mean(H x^') x^)
    g_a = sum(g x^ + h x^'),   g_a' = sum(h x^),   g_b = sum(g),   g_b' = sum(h)       (sums over the rows of a group)

RMS norm is the same without the mean and without 1 1^T / D. Row statistics are recomputed in the backward pass, where
a row is in cache or in registers anyway, so nothing but the arguments is saved.

Shape legend:  R rows   D normalised elements   G groups of R / G consecutive rows that share gain and bias   P parts
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmf_fast.ops import reference
from mmf_fast.ops.arguments import Arguments
from mmf_fast.ops.dispatch import define, empty_or, has_flags, register_affine_norm
from mmf_fast.ops.gpu import jit, processors, tl, triton

__all__ = ["layer_norm_tangent", "modulated_layer_norm", "per_row"]


def modulated_layer_norm(
    x: Tensor,
    dx: Tensor | None = None,
    gain: Tensor | None = None,
    dgain: Tensor | None = None,
    bias: Tensor | None = None,
    dbias: Tensor | None = None,
    *,
    rms: bool = False,
    eps: float = 1e-5,
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(y, y') of the formulas above over the last dimension, differentiable in every tensor argument.

    x, dx: (B, ..., D), float32, float64, bfloat16 or float16. gain, bias and their tangents, of x's dtype: (D,), or
    (B, 1, ..., 1, D) as in adaLN. None stands for 1 (gain) or 0. tangent_grad=False detaches y', and then nothing is
    saved for it. y' is None when no tangent is given. Raises ValueError for a gain or bias of another shape.
    """
    if dx is None and dgain is None and dbias is None:
        tangent_grad = False
    size = x.shape[-1]
    groups = max((p.numel() // max(size, 1) for p in (gain, dgain, bias, dbias) if p is not None), default=1)
    parameters = [_grouped(p, x, groups) for p in (gain, dgain, bias, dbias)]
    rows = (x.reshape(-1, size).contiguous(), None if dx is None else dx.reshape(-1, size).contiguous())
    y, dy = _operator(*rows, *parameters, rms, eps, tangent_grad)
    if dx is None and dgain is None and dbias is None:
        return y.view(x.shape), None
    return y.view(x.shape), dy.view(x.shape) if tangent_grad else dy.view(x.shape).detach()


def per_row(p: Any, x: Tensor) -> bool:
    """Whether a gain or bias has a shape that `modulated_layer_norm` takes: None, (D,) or (B, 1, ..., 1, D)."""
    return p is None or p.shape == x.shape[-1:] or p.shape == (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])


def _grouped(p: Tensor | None, x: Tensor, groups: int) -> Tensor | None:
    if p is None:
        return None
    if not per_row(p, x):
        raise ValueError(f"gain and bias are (D,) or (B, 1, ..., 1, D) for x {tuple(x.shape)}, not {tuple(p.shape)}")
    p = p.reshape(-1, p.shape[-1])
    return (p if p.shape[0] == groups else p.expand(groups, -1)).contiguous()


# -- Triton: one program per row; backward: one per part of a group, which sums what its gain and bias receive ---------


@jit
def forward_kernel(
    x_ptr, dx_ptr, gain_ptr, dgain_ptr, bias_ptr, dbias_ptr, y_ptr, dy_ptr,
    rows_per_group, D, eps: tl.constexpr,
    HAS_DX: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_DGAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DBIAS: tl.constexpr, RMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    at = row * D + column
    at_group = row // rows_per_group * D + column

    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    wide = x.to(tl.float64) if x.dtype == tl.float64 else x.to(tl.float32)
    # All loads before the first sum: what waits for a sum is not on its way meanwhile.
    if HAS_DX:
        dx = tl.load(dx_ptr + at, mask=inside, other=0.0).to(wide.dtype)
    if HAS_GAIN:
        gain = tl.load(gain_ptr + at_group, mask=inside, other=0.0).to(wide.dtype)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + at_group, mask=inside, other=0.0).to(wide.dtype)
    mean = 0.0 if RMS else tl.sum(wide, 0) / D
    centred = tl.where(inside, wide - mean, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    x_hat = centred * r

    y = x_hat
    if HAS_GAIN:
        y = y * gain
    if HAS_BIAS:
        y += bias
    tl.store(y_ptr + at, y.to(x.dtype), mask=inside)

    if HAS_DX or HAS_DGAIN or HAS_DBIAS:
        dy = tl.zeros_like(x_hat)
        if HAS_DX:
            m2 = tl.sum(x_hat * dx, 0) / D
            dy = r * (dx - (0.0 if RMS else tl.sum(dx, 0) / D) - x_hat * m2)
            if HAS_GAIN:
                dy = dy * gain
        if HAS_DGAIN:
            dy += x_hat * tl.load(dgain_ptr + at_group, mask=inside, other=0.0).to(wide.dtype)
        if HAS_DBIAS:
            dy += tl.load(dbias_ptr + at_group, mask=inside, other=0.0).to(wide.dtype)
        tl.store(dy_ptr + at, dy.to(x.dtype), mask=inside)


@jit
def backward_kernel(
    g_ptr, h_ptr, x_ptr, dx_ptr, gain_ptr, dgain_ptr, g_x_ptr, g_dx_ptr,
    g_gain_ptr, g_dgain_ptr, g_bias_ptr, g_dbias_ptr,
    rows_per_group, rows_per_part, D, eps: tl.constexpr,
    HAS_G: tl.constexpr, HAS_H: tl.constexpr, HAS_DX: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_DGAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DBIAS: tl.constexpr, RMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < D
    at_group = group * D + column
    at_part = (group * tl.num_programs(1) + part) * D + column
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    if HAS_GAIN:
        gain = tl.load(gain_ptr + at_group, mask=inside, other=0.0).to(wide)
        g_gain = tl.zeros((BLOCK,), wide)
    if HAS_DGAIN:
        dgain = tl.load(dgain_ptr + at_group, mask=inside, other=0.0).to(wide)
        g_dgain = tl.zeros((BLOCK,), wide)
    if HAS_BIAS:
        g_bias = tl.zeros((BLOCK,), wide)
    if HAS_DBIAS:
        g_dbias = tl.zeros((BLOCK,), wide)

    for i in range(part * rows_per_part, tl.minimum((part + 1) * rows_per_part, rows_per_group)):
        at = (group * rows_per_group + i) * D + column
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(wide)
        if HAS_G:
            g = tl.load(g_ptr + at, mask=inside, other=0.0).to(wide)
        if HAS_H:
            h = tl.load(h_ptr + at, mask=inside, other=0.0).to(wide)
        if HAS_H and HAS_DX:
            dx = tl.load(dx_ptr + at, mask=inside, other=0.0).to(wide)
        mean = 0.0 if RMS else tl.sum(x, 0) / D
        centred = tl.where(inside, x - mean, 0.0)
        r = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
        x_hat = centred * r

        of_x_hat = tl.zeros_like(x_hat)
        if HAS_G:
            of_x_hat = g * gain if HAS_GAIN else g
            if HAS_BIAS:
                g_bias += g
            if HAS_GAIN:
                g_gain += g * x_hat
        if HAS_H:
            of_d_hat = h * gain if HAS_GAIN else h
            if HAS_DBIAS:
                g_dbias += h
            if HAS_DGAIN:
                g_dgain += h * x_hat
                of_x_hat += h * dgain
        g_x = r * (of_x_hat - (0.0 if RMS else tl.sum(of_x_hat, 0) / D) - x_hat * (tl.sum(of_x_hat * x_hat, 0) / D))
        if HAS_H and HAS_DX:
            m2 = tl.sum(x_hat * dx, 0) / D
            d_hat = tl.where(inside, r * (dx - (0.0 if RMS else tl.sum(dx, 0) / D) - x_hat * m2), 0.0)
            dot = tl.sum(of_d_hat * x_hat, 0) / D
            g_dx = r * (of_d_hat - (0.0 if RMS else tl.sum(of_d_hat, 0) / D) - x_hat * dot)
            g_x -= r * (m2 * g_dx + dot * d_hat + tl.sum(of_d_hat * d_hat, 0) / D * x_hat)
            if HAS_GAIN:
                g_gain += h * d_hat
            tl.store(g_dx_ptr + at, g_dx.to(g_dx_ptr.dtype.element_ty), mask=inside)
        tl.store(g_x_ptr + at, g_x.to(g_x_ptr.dtype.element_ty), mask=inside)

    if HAS_GAIN:
        tl.store(g_gain_ptr + at_part, g_gain, mask=inside)
    if HAS_DGAIN:
        tl.store(g_dgain_ptr + at_part, g_dgain, mask=inside)
    if HAS_BIAS:
        tl.store(g_bias_ptr + at_part, g_bias, mask=inside)
    if HAS_DBIAS:
        tl.store(g_dbias_ptr + at_part, g_dbias, mask=inside)


def _block(size: int) -> dict[str, int]:
    """A row per program, in registers: 4 to 16 elements per thread."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def _forward_triton(
    x: Tensor, dx: Any, gain: Any, dgain: Any, bias: Any, dbias: Any, rms: bool, eps: float, tangent_grad: bool
) -> tuple[Tensor, Tensor]:
    y, dy = _fake(x, dx, gain, dgain, bias, dbias, rms, eps, tangent_grad)
    if x.numel():
        forward_kernel[(x.shape[0],)](
            x, dx, gain, dgain, bias, dbias, y, dy, x.shape[0] // _groups(gain, dgain, bias, dbias), x.shape[1], eps,
            **has_flags(DX=dx, GAIN=gain, DGAIN=dgain, BIAS=bias, DBIAS=dbias), RMS=rms, **_block(x.shape[1]),
        )  # fmt: skip
    return y, dy


def _backward_triton(
    g: Any, h: Any, x: Tensor, dx: Any, gain: Any, dgain: Any, bias: Any, dbias: Any, rms: bool, eps: float
) -> tuple[Tensor, ...]:
    outputs = _fake_backward(g, h, x, dx, gain, dgain, bias, dbias, rms, eps)
    if x.numel() == 0:
        return tuple(out.zero_() for out in outputs)
    groups = _groups(gain, dgain, bias, dbias)
    parts = min(x.shape[0] // groups, triton.cdiv(4 * processors(x.device), groups))
    per_part = triton.cdiv(x.shape[0] // groups, parts)
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = [x.new_empty((groups, parts, x.shape[1]) if out.numel() else 0, dtype=wide) for out in outputs[2:]]
    backward_kernel[(groups, parts)](
        g, h, x, dx, gain, dgain, *outputs[:2], *sums, x.shape[0] // groups, per_part, x.shape[1], eps,
        **has_flags(G=g, H=h, DX=dx, GAIN=gain, BIAS=bias), HAS_DGAIN=dgain is not None and h is not None,
        HAS_DBIAS=dbias is not None and h is not None, RMS=rms, **_block(x.shape[1]),
    )  # fmt: skip
    return (*outputs[:2], *(s.sum(1).to(x.dtype) if s.numel() else s.to(x.dtype) for s in sums))


def _groups(*parameters: Tensor | None) -> int:
    return next((p.shape[0] for p in parameters if p is not None and p.ndim), 1)


# -- registration ------------------------------------------------------------------------------------------------------


def _fake(
    x: Tensor, dx: Any, gain: Any, dgain: Any, bias: Any, dbias: Any, rms: bool, eps: float, tangent_grad: bool
) -> tuple[Tensor, Tensor]:
    some = dx is not None or dgain is not None or dbias is not None
    return torch.empty_like(x), torch.empty_like(x) if some else x.new_empty(0)


def _fake_backward(
    g: Any, h: Any, x: Tensor, dx: Any, gain: Any, dgain: Any, bias: Any, dbias: Any, rms: bool, eps: float
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(x),
        empty_or(dx if h is not None else None, x),
        empty_or(gain, x),
        empty_or(dgain if h is not None else None, x),
        empty_or(bias, x),
        empty_or(dbias if h is not None else None, x),
    )


def _check(
    x: Tensor, dx: Any, gain: Any, dgain: Any, bias: Any, dbias: Any, *_: Any, name: str = "modulated_layer_norm"
) -> Arguments:
    arguments = Arguments(name, x, dimensions=2)
    arguments.tensors(x.shape, contiguous=True, x=x, dx=dx)
    groups = _groups(gain, dgain, bias, dbias)
    shape = (groups, x.shape[1])
    arguments.tensors(shape, contiguous=True, gain=gain, dgain=dgain, bias=bias, dbias=dbias)
    divides = x.shape[0] % groups == 0 if groups else x.shape[0] == 0
    arguments.holds(divides, f"{groups} rows of gain and bias do not divide {x.shape[0]} rows of x")
    return arguments


def _check_backward(g: Any, h: Any, x: Tensor, *rest: Any) -> None:
    arguments = _check(x, *rest, name="modulated_layer_norm_backward")
    arguments.tensors(x.shape, contiguous=True, g=g, h=h)


_PARAMETERS = "Tensor x, Tensor? dx, Tensor? gain, Tensor? dgain, Tensor? bias, Tensor? dbias, bool rms, float eps"
_operator = define(
    f"modulated_layer_norm({_PARAMETERS}, bool tangent_grad) -> (Tensor, Tensor)",
    reference.modulated_layer_norm,
    _fake,
    _forward_triton,
    check=_check,
)
_backward_operator = define(
    f"modulated_layer_norm_backward(Tensor? g, Tensor? h, {_PARAMETERS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.modulated_layer_norm_backward,
    _fake_backward,
    _backward_triton,
    check=_check_backward,
)


register_affine_norm(_operator, _backward_operator)


# -- the tangent alone, composed of PyTorch's kernels: what torch.compile traces ---------------------------------------


def layer_norm_tangent(x: Tensor, dx: Tensor, shape: Sequence[int], eps: float) -> Tensor:
    """x^' over the trailing dimensions `shape` of x and dx (..., *shape), differentiable in both."""
    x_hat, mean, r = torch.native_layer_norm(x, shape, None, None, eps)
    if torch.is_grad_enabled():
        return _LayerNormTangent.apply(x, dx, x_hat, mean, r, list(shape))
    return _jacobian(dx, x, shape, mean, r)


def _jacobian(v: Tensor, x: Tensor, shape: Sequence[int], mean: Tensor, r: Tensor) -> Tensor:
    return torch.ops.aten.native_layer_norm_backward(v, x, shape, mean, r, None, None, [True, False, False])[0]


class _LayerNormTangent(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dx: Tensor, x_hat: Tensor, mean: Tensor, r: Tensor, shape: list[int]) -> Tensor:
        return _jacobian(dx, x, shape, mean, r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.shape = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        x, dx, x_hat, mean, r, d_hat = ctx.saved_tensors
        dims = tuple(range(-len(ctx.shape), 0))

        def average(a: Tensor, b: Tensor) -> Tensor:
            return r * (a * b).mean(dims, keepdim=True)

        g_dx = _jacobian(h, x, ctx.shape, mean, r)
        g_x = -(average(x_hat, dx) * g_dx).addcmul(average(x_hat, h), d_hat).addcmul(average(h, d_hat), x_hat)
        return g_x, g_dx, None, None, None, None
