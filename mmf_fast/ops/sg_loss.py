"""The loss of the MeanFlow family, from network output to weighted mean.

    e = u + (t - r) SG_lam[du] - v,   v = noise - x or a given target
    loss = mean_b w_b s_b,   s_b = ||e_b||^2,   w_b = stopgrad(1 / (s_b + c)^p)

SG_lam does not change the value, so lam enters in the backward pass only:  g_u = 2 g w_b e_b / B,
g_du = lam (t - r) g_u. One pass over the data forward, which keeps e; one pass backward.

Shape legend:  B batch   K elements of a sample
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmf_fast.ops import native, reference
from mmf_fast.ops.arguments import Arguments
from mmf_fast.ops.dispatch import define, serve
from mmf_fast.ops.gpu import jit, tl, triton

__all__ = ["LossTerms", "sg_loss"]


class LossTerms(NamedTuple):
    """loss: 0-d. per_sample: its terms (B,). square: s (B,). Only the loss is differentiable."""

    loss: Tensor
    per_sample: Tensor
    square: Tensor


def sg_loss(
    u: Tensor,
    du: Tensor | None,
    interval: Tensor,
    lam: Tensor | float,
    *,
    target: Tensor | None = None,
    x: Tensor | None = None,
    noise: Tensor | None = None,
    p: float = 1.0,
    c: float = 1e-3,
    tangent_grad: bool = True,
) -> LossTerms:
    """The loss of the formulas above, differentiable in u and du.

    u, du: (B, ...), any floating dtype; du=None where r = t. interval: t - r, (B,). lam: a number or a 0-d tensor on
    u's device, whose value is not read on the host. target: (B, ...); or x and noise, whose difference it is.
    tangent_grad=False: du gets no gradient (lam = 0). Arithmetic and result are in float32 at least.
    Raises ValueError unless either target or both x and noise are given.
    """
    if (target is None) == (x is None) or (x is None) != (noise is None):
        raise ValueError("sg_loss needs either target, or x and noise")
    dtype = torch.promote_types(u.dtype, torch.float32)
    if not isinstance(lam, Tensor):
        lam = torch.full((), lam, dtype=dtype, device=u.device)  # as_tensor would wait for the device
    lam = lam.to(u.device, dtype).detach()
    fixed = noise if target is None else target
    given = (
        _rows(u, u.dtype), _rows(du, u.dtype), _rows(x, dtype, True), _rows(fixed, dtype, True),
        interval.detach().to(dtype).contiguous(), lam, p, c, tangent_grad and du is not None,
    )  # fmt: skip
    if serve("sg_loss", u) == "native" and (differentiable := native.op("sg_loss_differentiable")):
        # the operator and its autograd formula in one call of C++, at less cost
        return LossTerms(*differentiable(*given))
    loss, per_sample, square, _ = _operator(*given)
    return LossTerms(loss, per_sample.detach(), square.detach())


def _rows(a: Tensor | None, to: torch.dtype, constant: bool = False) -> Any:
    """(B, ...) as (B, K) of a dtype."""
    if a is None:
        return None
    a = a.detach() if constant else a
    return a.reshape(a.shape[0], math.prod(a.shape[1:])).to(to).contiguous()


# -- Triton: one program per block of a sample -------------------------------------------------------------------------


@jit
def forward_kernel(
    u_ptr, du_ptr, x_ptr, noise_ptr, interval_ptr, error_ptr, square_ptr, K,
    HAS_DU: tl.constexpr, HAS_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < K
    at = b.to(tl.int64) * K + offset
    wide: tl.constexpr = error_ptr.dtype.element_ty
    e = tl.load(u_ptr + at, mask=inside, other=0.0).to(wide) - tl.load(noise_ptr + at, mask=inside, other=0.0)
    if HAS_X:
        e += tl.load(x_ptr + at, mask=inside, other=0.0)
    if HAS_DU:
        e += tl.load(interval_ptr + b) * tl.load(du_ptr + at, mask=inside, other=0.0).to(wide)
    tl.store(error_ptr + at, e, mask=inside)
    tl.store(square_ptr + b * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.where(inside, e * e, 0.0)))


@jit
def backward_kernel(
    g_ptr, error_ptr, square_ptr, interval_ptr, lam_ptr, g_u_ptr, g_du_ptr, B, K, p: tl.constexpr, c: tl.constexpr,
    TANGENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < K
    at = b.to(tl.int64) * K + offset
    weight = tl.exp2(-p * tl.log2(tl.load(square_ptr + b) + c))
    g_u = 2.0 * tl.load(g_ptr) / B * weight * tl.load(error_ptr + at, mask=inside, other=0.0)
    tl.store(g_u_ptr + at, g_u.to(g_u_ptr.dtype.element_ty), mask=inside)
    if TANGENT:
        g_du = tl.load(lam_ptr) * tl.load(interval_ptr + b) * g_u
        tl.store(g_du_ptr + at, g_du.to(g_du_ptr.dtype.element_ty), mask=inside)


def _block(size: int) -> dict[str, int]:
    return {"BLOCK": min(triton.next_power_of_2(max(size, 1)), 4096), "num_warps": 8}


def _forward_triton(
    u: Tensor, du: Any, x: Any, noise: Tensor, interval: Tensor, lam: Tensor, p: float, c: float, tangent_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    error, options = torch.empty_like(u, dtype=noise.dtype), _block(u.shape[1])
    blocks = triton.cdiv(u.shape[1], options["BLOCK"])
    parts = error.new_empty(u.shape[0], blocks)
    if u.numel():
        forward_kernel[(u.shape[0], blocks)](
            u, du, x, noise, interval, error, parts, u.shape[1], HAS_DU=du is not None, HAS_X=x is not None, **options
        )
    square = parts.sum(1)
    per_sample = square * (square + c) ** -p
    return per_sample.mean(), per_sample, square, error


def _backward_triton(
    g: Tensor, error: Tensor, square: Tensor, interval: Tensor, lam: Tensor, p: float, c: float, tangent_grad: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    g_u, g_du = _fake_backward(g, error, square, interval, lam, p, c, tangent_grad, dtype)
    if error.numel():
        options = _block(error.shape[1])
        backward_kernel[(error.shape[0], triton.cdiv(error.shape[1], options["BLOCK"]))](
            g, error, square, interval, lam, g_u, g_du, *error.shape, p, c, TANGENT=tangent_grad, **options
        )
    return g_u, g_du


# -- registration ------------------------------------------------------------------------------------------------------


def _fake(u: Tensor, du: Any, x: Any, noise: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    per_sample = noise.new_empty(u.shape[0])
    return noise.new_empty(()), per_sample, torch.empty_like(per_sample), torch.empty_like(u, dtype=noise.dtype)


def _fake_backward(
    g: Tensor, error: Tensor, square: Tensor, interval: Tensor, lam: Tensor, p: float, c: float, tangent_grad: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    g_u = torch.empty_like(error, dtype=dtype)
    return g_u, torch.empty_like(g_u) if tangent_grad else g_u.new_empty(0)


def _check(u: Tensor, du: Any, x: Any, noise: Tensor, interval: Tensor, lam: Tensor, *_: Any) -> None:
    arguments, wide = Arguments("sg_loss", u, dimensions=2), torch.promote_types(u.dtype, torch.float32)
    arguments.tensors(u.shape, contiguous=True, u=u, du=du)
    arguments.tensors(u.shape, wide, contiguous=True, x=x, target=noise)
    arguments.tensors(u.shape[:1], wide, contiguous=True, interval=interval)
    arguments.tensors((), wide, lam=lam)


def _check_backward(g: Tensor, error: Tensor, square: Tensor, interval: Tensor, lam: Tensor, *rest: Any) -> None:
    arguments = Arguments("sg_loss_backward", error, dimensions=2)
    arguments.tensors(error.shape, torch.promote_types(rest[-1], torch.float32), contiguous=True, error=error)
    arguments.tensors(error.shape[:1], contiguous=True, square=square, interval=interval)
    arguments.tensors((), lam=lam, g=g)


def _takes(kind: str, *args: Any) -> bool:
    """All that `_check` allows: the network's output in any precision, the rest in float32 at least."""
    return True


_operator = define(
    "sg_loss(Tensor u, Tensor? du, Tensor? x, Tensor noise, Tensor interval, Tensor lam, float p, float c,"
    " bool tangent_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.sg_loss,
    _fake,
    _forward_triton,
    check=_check,
    takes=_takes,
)
_backward_operator = define(
    "sg_loss_backward(Tensor g, Tensor error, Tensor square, Tensor interval, Tensor lam, float p, float c,"
    " bool tangent_grad, ScalarType dtype) -> (Tensor, Tensor)",
    reference.sg_loss_backward,
    _fake_backward,
    _backward_triton,
    check=_check_backward,
    takes=_takes,
)


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    u, _, _, _, interval, lam, ctx.p, ctx.c, ctx.tangent_grad = inputs
    _, _, square, error = output
    ctx.dtype = u.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(error, square, interval, lam)


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple:
    if g is None:
        return (None,) * 9
    g_u, g_du = _backward_operator(g, *ctx.saved_tensors, ctx.p, ctx.c, ctx.tangent_grad, ctx.dtype)
    return (g_u, g_du if ctx.tangent_grad else None, *[None] * 7)


_operator.differentiate(_backward, _setup)
