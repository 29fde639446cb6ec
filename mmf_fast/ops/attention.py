"""Softmax attention and its tangent, as one operator with three backward passes.

    S = s q k^T + mask,   P = softmax(S),   S' = s (q' k^T + q k'^T),   mu = rowsum(P * S'),   H = P * (S' - mu)
    O = P v,              O' = H v + P v'

For cotangents g of O and h of O', with G = g v^T + h v'^T, G' = h v^T, gam = rowsum(h * O) and
del = rowsum(g * O + h * O'):

    dS' = P * (G' - gam)            dS = P * (G + (G' - gam) * (S' - mu) - del)
    g_q = s (dS k + dS' k')         g_k = s (dS^T q + dS'^T q')         g_v = P^T g + H^T h
    g_q' = s dS' k                  g_k' = s dS'^T q                    g_v' = P^T h

Forward, 6 matrix products in one pass over the keys, with sums O and O' that are rescaled as the maximum of a row
grows. H is summed about the mean mu of the keys so far, and O' moves with it by a multiple of O, so that nothing
cancels. Saved: O, O', mu and LSE = log sum exp S, so memory is linear in the sequence. Backward, 15 products with
P = exp(S - LSE); when no gradient flows through O' only the ordinary 5, and only q, k, v, O and LSE are saved, as in a
plain attention.

Shape legend:  B batch   H heads   N queries   M keys   D head size   E head size of v
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from mmf_fast.ops import attention_triton, flash, reference
from mmf_fast.ops.arguments import Arguments
from mmf_fast.ops.dispatch import define

__all__ = ["attention", "attention_tangent"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(O, O') of the formulas above, differentiable in q, k, v and their tangents.

    q, dq: (..., N, D). k, dk: (..., M, D). v, dv: (..., M, E). Of one dtype (float32, float64, bfloat16, float16), any
    strides, leading dimensions broadcast; a tangent of None is zero. mask: boolean (True: attend) or additive (after
    scaling), broadcast to (..., N, M); a row that attends to nothing is 0. is_causal: query i attends to keys <= i.
    scale: s, by default 1/sqrt(D). tangent_grad=False detaches O', and then nothing is saved for it.
    Returns (..., N, E) twice; O' is None when no tangent is given. Raises ValueError for arguments that do not fit and
    for a mask that requires a gradient.
    """
    if mask is not None and mask.requires_grad:
        raise ValueError("the mask of attention gets no gradient: detach it, or compose softmax(s q k^T + mask) v")
    if not all(x is None or x.dtype == q.dtype for x in (k, v, dq, dk, dv)):
        raise ValueError(f"q, k, v and their tangents must have one dtype, {q.dtype} here: cast them")
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention takes q (..., N, D), k (..., M, D), v (..., M, E), not {shapes}")
    for x, dx in ((q, dq), (k, dk), (v, dv)):
        if dx is not None and dx.shape != x.shape:
            raise ValueError(f"a tangent has the shape of its primal, {tuple(x.shape)}, not {tuple(dx.shape)}")
    if dq is None and dk is None and dv is None:
        tangent_grad = False

    lead = q.shape[:-2]
    if not k.shape[:-2] == lead == v.shape[:-2]:
        lead = torch.broadcast_shapes(lead, k.shape[:-2], v.shape[:-2])
    q, dq, k, dk, v, dv = (_four_dimensions(x, lead) for x in (q, dq, k, dk, v, dv))
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        mask = _four_dimensions(mask.expand(*mask.shape[:-2], q.shape[-2], k.shape[-2]), lead)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    o, d_o, _, _ = _operator(q, dq, k, dk, v, dv, mask, is_causal, scale, tangent_grad)
    d_o = None if dq is None and dk is None and dv is None else d_o if tangent_grad else d_o.detach()
    if len(lead) != 2:
        shape = (*lead, *o.shape[-2:])
        o, d_o = o.reshape(shape), None if d_o is None else d_o.reshape(shape)
    return o, d_o


def _four_dimensions(x: Tensor | None, lead: torch.Size) -> Any:
    """(..., N, D) as (B, H, N, D), its leading dimensions expanded to `lead`."""
    if x is None:
        return None
    if x.shape[:-2] != lead:
        x = x.expand(*lead, *x.shape[-2:])
    if x.ndim < 4:
        return x[(None,) * (4 - x.ndim)]
    return x if x.ndim == 4 else x.flatten(0, -4)


# -- registration ------------------------------------------------------------------------------------------------------


def _check(
    q: Tensor, dq: Any, k: Tensor, dk: Any, v: Tensor, dv: Any, mask: Any, *_: Any, name: str = "attention"
) -> Arguments:
    arguments = Arguments(name, q, dimensions=4)
    arguments.holds(k.ndim == v.ndim == 4, f"k {tuple(k.shape)} and v {tuple(v.shape)} must have 4 dimensions")
    batch, heads, queries, width = q.shape
    arguments.tensors(q.shape, q=q, dq=dq)
    arguments.tensors((batch, heads, k.shape[2], width), k=k, dk=dk)
    arguments.tensors((batch, heads, k.shape[2], v.shape[3]), v=v, dv=dv)
    kind = torch.bool if mask is not None and mask.dtype == torch.bool else q.dtype
    arguments.tensors((batch, heads, queries, k.shape[2]), kind, mask=mask)
    return arguments


def _check_backward(
    g: Any, h: Any, q: Tensor, dq: Any, k: Tensor, dk: Any, v: Tensor, dv: Any, mask: Any,
    o: Tensor, d_o: Any, lse: Tensor, mu: Any, *_: Any,
) -> None:  # fmt: skip
    arguments = _check(q, dq, k, dk, v, dv, mask, name="attention_backward")
    wide = torch.promote_types(q.dtype, torch.float32)
    arguments.tensors((*q.shape[:3], v.shape[3]), g=g, h=h, o=o, d_o=d_o if h is not None else None)
    logits = h is not None and not (dq is None and dk is None)
    arguments.tensors(q.shape[:3], wide, contiguous=True, lse=lse, mu=mu if logits else None)
    arguments.holds(h is None or d_o is not None, "d_o must be given where it has a cotangent")
    arguments.holds(not logits or mu is not None, "mu must be given where q or k has a tangent")


def _takes(kind: str, q: Tensor, dq: Any, k: Tensor, dk: Any, v: Tensor, dv: Any, mask: Any = None, *_: Any) -> bool:
    """Tensors of one dtype, a mask without gradient, and for Triton sizes that its kernels have."""
    floats = [x for x in (q, dq, k, dk, v, dv, mask) if x is not None and x.dtype != torch.bool]
    if any(x.dtype != q.dtype for x in floats) or (mask is not None and mask.requires_grad):
        return False
    return kind != "triton" or attention_triton.has_kernels(q, k, v)


def _takes_backward(kind: str, g: Any, h: Any, *rest: Any) -> bool:
    return _takes(kind, *rest)


_OPERANDS = "Tensor q, Tensor? dq, Tensor k, Tensor? dk, Tensor v, Tensor? dv, Tensor? mask"
_operator = define(
    f"attention({_OPERANDS}, bool causal, float scale, bool tangent_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.attention,
    attention_triton.outputs,
    attention_triton.forward,
    check=_check,
    takes=_takes,
)
_backward_operator = define(
    f"attention_backward(Tensor? g, Tensor? h, {_OPERANDS}, Tensor o, Tensor? d_o, Tensor lse, Tensor? mu, bool causal,"
    " float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.attention_backward,
    lambda g, h, q, dq, k, dk, v, dv, *_: attention_triton.gradients(h, q, dq, k, dk, v, dv),
    attention_triton.backward,
    check=_check_backward,
    takes=_takes_backward,
)


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    q, dq, k, dk, v, dv, mask, ctx.causal, ctx.scale, ctx.tangent_grad = inputs
    o, d_o, lse, mu = output
    ctx.set_materialize_grads(False)
    if ctx.tangent_grad:
        ctx.save_for_backward(q, k, v, mask, o, lse, dq, dk, dv, d_o, mu)
    else:
        ctx.save_for_backward(q, k, v, mask, o, lse)


def _backward(ctx: Any, g: Tensor | None, h: Tensor | None, *_: Any) -> tuple:
    q, k, v, mask, o, lse, *rest = ctx.saved_tensors
    dq = dk = dv = d_o = mu = None
    if not ctx.tangent_grad or h is None:
        h = None
        if g is None:
            return (None,) * 10
        if _flash_serves(q, k, v, mask, ctx.causal):
            g_q, g_k, g_v = _flash_backward(g, q, k, v, o, lse, ctx.causal, ctx.scale)
            return g_q, None, g_k, None, g_v, None, None, None, None, None
    else:
        dq, dk, dv, d_o, mu = rest
        mu = mu if mu.numel() or not lse.numel() else None
    grads = _backward_operator(g, h, q, dq, k, dk, v, dv, mask, o, d_o, lse, mu, ctx.causal, ctx.scale)
    present = (q, dq, k, dk, v, dv)
    return (*(None if x is None else grad for x, grad in zip(present, grads, strict=True)), None, None, None, None)


_operator.differentiate(_backward, _setup)


def _flash_serves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether flash attention has a backward pass for these arguments: then O and LSE suffice for it."""
    return (
        q.is_cuda
        and mask is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] % 8 == 0
        and not (causal and q.shape[-2] != k.shape[-2])
        and q.numel() > 0
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and not os.environ.get("MMF_FAST_OPS")
    )


def _flash_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of plain attention, by the kernel that ops/flash.py has put in place: FlashAttention 2, 3 or 4
    through PyTorch's dispatcher, or cuDNN's, which takes no single row and is not deterministic."""
    g, q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (g, q, k, v))
    several = q.shape[-2] > 1 and k.shape[-2] > 1
    if flash.serving() == "cudnn" and several and not torch.are_deterministic_algorithms_enabled():
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # the state of a dropout that is off
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            g, q, k, v, o, lse.unsqueeze(-1), unused, unused, None, None, None, q.shape[-2], k.shape[-2], 0.0, causal,
            scale=scale,
        )  # fmt: skip
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        g, q, k, v, o, lse, None, None, q.shape[-2], k.shape[-2], 0.0, causal, unused, unused, scale=scale
    )


# -- the tangent alone, composed of PyTorch's kernels: where the operator does not serve -------------------------------


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """O' of O = softmax(s q k^T + mask) v for tangents of q, k, v (None: zero).

    q: (..., N, D). k: (..., M, D). v: (..., M, E). mask: boolean (True: attend) or additive, broadcast to (..., N, M).
    Returns (..., N, E). scale: s, by default 1/sqrt(D).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    logits = scale * q @ k.mT
    if is_causal:
        allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~allowed, -math.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    p = torch.ops.aten._safe_softmax(logits, -1)  # a row that attends to nothing is 0, as in SDPA

    parts = []
    if dq is not None or dk is not None:
        d_logits: Any = None if dq is None else scale * dq @ k.mT
        if dk is not None:
            from_k = scale * q @ dk.mT
            d_logits = from_k if d_logits is None else d_logits + from_k
        d_p = torch.ops.aten._softmax_backward_data(d_logits.to(p.dtype), p, -1, p.dtype)
        parts.append(d_p @ v)
    if dv is not None:
        parts.append(p @ dv)
    return sum(parts[1:], start=parts[0])
