"""The loss of the MeanFlow family, from network output to weighted mean.

    e = u + (t - r) SG_lam[du] - v,   v the target
    loss = mean_b w_b s_b,   s_b = ||e_b||^2,   w_b = stopgrad(1 / (s_b + c)^p)

SG_lam does not change the value, so lam enters in the backward pass only:  g_u = 2 g w_b e_b / B,
g_du = lam (t - r) g_u. One pass over the data forward, which keeps nothing but s; one pass backward, which computes e
again: to keep it would cost as much memory traffic, and fresh pages.

Shape legend:  B batch   K elements of a sample
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmf_fast.ops import reference
from mmf_fast.ops.arguments import Arguments
from mmf_fast.ops.dispatch import define
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
    target: Tensor,
    *,
    p: float = 1.0,
    c: float = 1e-3,
    tangent_grad: bool = True,
) -> LossTerms:
    """The loss of the formulas above, differentiable in u and du.

    u, du: (B, ...), any floating dtype; du=None where r = t. interval: t - r, (B,). lam: a number or a 0-d tensor on
    u's device, whose value is not read on the host. target: (B, ...). tangent_grad=False: du gets no gradient
    (lam = 0). Arithmetic and result are in float32 at least. Raises ValueError for tensors of other shapes.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    if not isinstance(lam, Tensor):
        lam = torch.full((), lam, dtype=dtype, device=u.device)  # as_tensor would wait for the device
    lam = lam.to(u.device, dtype).detach()
    loss, per_sample, square = _operator(
        _rows(u, u.dtype), None if du is None else _rows(du, u.dtype), _rows(target.detach(), dtype),
        interval.detach().to(dtype).contiguous(), lam, p, c, tangent_grad and du is not None,
    )  # fmt: skip
    return LossTerms(loss, per_sample.detach(), square.detach())


def _rows(a: Tensor, to: torch.dtype) -> Tensor:
    """(B, ...) as (B, K) of a dtype."""
    return a.reshape(a.shape[0], math.prod(a.shape[1:])).to(to).contiguous()


# -- Triton: one program per block of a sample -------------------------------------------------------------------------


@jit
def error(
    u_ptr, du_ptr, target_ptr, interval_ptr, K, HAS_DU: tl.constexpr, wide: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """e on the block of this program, zero outside; where it lies and what of it is inside."""
    b = tl.program_id(0)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < K
    at = b.to(tl.int64) * K + offset
    e = tl.load(u_ptr + at, mask=inside, other=0.0).to(wide) - tl.load(target_ptr + at, mask=inside, other=0.0)
    if HAS_DU:
        e += tl.load(interval_ptr + b) * tl.load(du_ptr + at, mask=inside, other=0.0).to(wide)
    return e, at, inside


@jit
def forward_kernel(
    u_ptr, du_ptr, target_ptr, interval_ptr, square_ptr, K, HAS_DU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    e, _, _ = error(u_ptr, du_ptr, target_ptr, interval_ptr, K, HAS_DU, square_ptr.dtype.element_ty, BLOCK)
    tl.store(square_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(e * e))


@jit
def backward_kernel(
    g_ptr, u_ptr, du_ptr, target_ptr, square_ptr, interval_ptr, lam_ptr, g_u_ptr, g_du_ptr, B, K, p: tl.constexpr,
    c: tl.constexpr, HAS_DU: tl.constexpr, TANGENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    e, at, inside = error(u_ptr, du_ptr, target_ptr, interval_ptr, K, HAS_DU, square_ptr.dtype.element_ty, BLOCK)
    weight = tl.exp2(-p * tl.log2(tl.load(square_ptr + b) + c))
    g_u = 2.0 * tl.load(g_ptr) / B * weight * e
    tl.store(g_u_ptr + at, g_u.to(g_u_ptr.dtype.element_ty), mask=inside)
    if TANGENT:
        g_du = tl.load(lam_ptr) * tl.load(interval_ptr + b) * g_u
        tl.store(g_du_ptr + at, g_du.to(g_du_ptr.dtype.element_ty), mask=inside)


def _launch(size: int) -> tuple[int, dict[str, int]]:
    """Programs of a sample, and the constants of both kernels."""
    block = min(triton.next_power_of_2(max(size, 1)), 4096)
    return triton.cdiv(size, block), {"BLOCK": block, "num_warps": 8}


def _forward_triton(
    u: Tensor, du: Any, target: Tensor, interval: Tensor, lam: Tensor, p: float, c: float, tangent_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    blocks, constants = _launch(u.shape[1])
    parts = target.new_empty(u.shape[0], blocks)
    if u.numel():
        forward_kernel[(u.shape[0], blocks)](
            u, du, target, interval, parts, u.shape[1], HAS_DU=du is not None, **constants
        )
    square = parts.sum(1)
    per_sample = square * (square + c) ** -p
    return per_sample.mean(), per_sample, square


def _backward_triton(
    g: Tensor, u: Tensor, du: Any, target: Tensor, square: Tensor, interval: Tensor, lam: Tensor, p: float, c: float,
    tangent_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    g_u, g_du = _fake_backward(g, u, du, target, square, interval, lam, p, c, tangent_grad)
    if u.numel():
        blocks, constants = _launch(u.shape[1])
        backward_kernel[(u.shape[0], blocks)](
            g, u, du, target, square, interval, lam, g_u, g_du, *u.shape, p, c, HAS_DU=du is not None,
            TANGENT=tangent_grad, **constants,
        )  # fmt: skip
    return g_u, g_du


# -- registration ------------------------------------------------------------------------------------------------------


def _fake(u: Tensor, du: Any, target: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    per_sample = target.new_empty(u.shape[0])
    return target.new_empty(()), per_sample, torch.empty_like(per_sample)


def _fake_backward(g: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(u) if rest[-1] else u.new_empty(0)


def _check(
    u: Tensor, du: Any, target: Tensor, interval: Tensor, lam: Tensor, *_: Any, name: str = "sg_loss"
) -> Arguments:
    arguments, wide = Arguments(name, u, dimensions=2), torch.promote_types(u.dtype, torch.float32)
    arguments.tensors(u.shape, contiguous=True, u=u, du=du)
    arguments.tensors(u.shape, wide, contiguous=True, target=target)
    arguments.tensors(u.shape[:1], wide, contiguous=True, interval=interval)
    arguments.tensors((), wide, lam=lam)
    return arguments


def _check_backward(
    g: Tensor, u: Tensor, du: Any, target: Tensor, square: Tensor, interval: Tensor, lam: Tensor, *_: Any
) -> None:
    arguments = _check(u, du, target, interval, lam, name="sg_loss_backward")
    arguments.tensors(u.shape[:1], interval.dtype, contiguous=True, square=square)
    arguments.tensors((), lam.dtype, g=g)


def _takes(kind: str, *args: Any) -> bool:
    """All that `_check` allows: the network's output in any precision, the rest in float32 at least."""
    return True


_operator = define(
    "sg_loss(Tensor u, Tensor? du, Tensor target, Tensor interval, Tensor lam, float p, float c, bool tangent_grad)"
    " -> (Tensor, Tensor, Tensor)",
    reference.sg_loss,
    _fake,
    _forward_triton,
    check=_check,
    takes=_takes,
)
_backward_operator = define(
    "sg_loss_backward(Tensor g, Tensor u, Tensor? du, Tensor target, Tensor square, Tensor interval, Tensor lam,"
    " float p, float c, bool tangent_grad) -> (Tensor, Tensor)",
    reference.sg_loss_backward,
    _fake_backward,
    _backward_triton,
    check=_check_backward,
    takes=_takes,
)


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    u, du, target, interval, lam, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, du, target, output[2], interval, lam)


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple:
    if g is None:
        return (None,) * 8
    g_u, g_du = _backward_operator(g, *ctx.saved_tensors, *ctx.options)
    return (g_u, g_du if ctx.options[-1] else None, *[None] * 6)


_operator.differentiate(_backward, _setup)
