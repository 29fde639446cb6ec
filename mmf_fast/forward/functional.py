"""The Jacobian-vector product of a function, in one of three ways: `jvp`.

Duals are the fast one. The others are for networks that Duals cannot run (isinstance checks, kernels of their own):
`func_jvp` is torch.func.jvp made right: the gradient that PyTorch returns through the tangent of layer, batch and
instance norm is silently wrong, so these are decomposed, and so is attention, which has no forward derivative.
`finite_difference_jvp` needs two evaluations of any function and is biased by its step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmf_fast.forward.dual import DetachedDual, Dual, primal, tangent
from mmf_fast.forward.interception import intercepted

__all__ = ["JVP_MODES", "finite_difference_jvp", "func_jvp", "jvp"]

JVP_MODES = ("dual", "func", "finite_difference")


def jvp(
    fn: Callable[..., Any],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    tangent_grad: bool = True,
    mode: str = "dual",
) -> tuple[Tensor, Tensor]:
    """The value of `fn` at `primals` and its directional derivative along `tangents`.

    fn: maps tensors to one tensor (or Duals to one Dual).
    tangents: one per primal, of its shape and dtype; None is a symbolic zero.
    tangent_grad: whether gradients flow through the tangent (SG_1) or not (SG_0, cheaper: nothing is saved for it).
    mode: "dual" runs fn on Duals; "func" is torch.func.jvp with exact norms and attention; "finite_difference"
        evaluates fn twice and is biased by its step.
    Raises ValueError for tangents that do not fit and for an unknown mode; MissingRuleError for an operation without
    a rule; TypeError when fn does not return one tensor.
    """
    if mode not in JVP_MODES:
        raise ValueError(f"unknown jvp mode {mode!r}: choose one of {', '.join(JVP_MODES)}")
    if len(primals) != len(tangents):
        raise ValueError(
            f"jvp got {len(primals)} primals and {len(tangents)} tangents: give one tangent (or None) each"
        )
    for i, (x, dx) in enumerate(zip(primals, tangents, strict=True)):
        if dx is not None and dx.shape != x.shape:
            raise ValueError(
                f"tangent {i} has shape {tuple(dx.shape)}, its primal {tuple(x.shape)}: they must be equal"
            )

    if mode == "dual":
        kind = Dual if tangent_grad else DetachedDual
        given = [dx if dx is None or tangent_grad else dx.detach() for dx in tangents]
        # a copy: the network may write into its input, and the tangents are the caller's
        duals = [
            x if dx is None else kind(x, torch.empty_like(x).copy_(dx)) for x, dx in zip(primals, given, strict=True)
        ]
        with intercepted():
            out = fn(*duals)
        y, dy = primal(out), tangent(out)
    elif mode == "func":
        y, dy = func_jvp(fn, primals, tangents)
    else:
        y, dy = finite_difference_jvp(fn, primals, tangents)
    if not isinstance(y, Tensor):
        raise TypeError(f"jvp needs a function that returns one tensor, not {type(y).__name__}: wrap it to pick one")
    dy = torch.zeros_like(y) if dy is None else dy  # no operation carried a tangent: fn is constant in its arguments
    return y, dy if tangent_grad else dy.detach()


def func_jvp(
    fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """(fn(*primals), its tangent) by torch.func.jvp; a tangent of None is a constant argument."""
    moving = [i for i, dx in enumerate(tangents) if dx is not None]

    def of_moving(*values: Tensor) -> Tensor:
        arguments = list(primals)
        for i, value in zip(moving, values, strict=True):
            arguments[i] = value
        return fn(*arguments)

    with _ExactDerivatives():
        pair = torch.func.jvp(of_moving, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))
    return pair[0], pair[1]


def finite_difference_jvp(
    fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None], step: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """(f(x), (f(x + h dx) - f(x)) / h): two evaluations, bias h/2 f''(dx, dx), rounding error about eps/h."""
    y = fn(*primals)
    shifted = [x if dx is None else x + step * dx for x, dx in zip(primals, tangents, strict=True)]
    return y, (fn(*shifted) - y) / step


class _ExactDerivatives(TorchFunctionMode):
    """Replace the operations whose derivatives torch.func gets wrong or lacks by compositions that it gets right."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _COMPOSITIONS:
            return _COMPOSITIONS[func](*args, **kwargs)
        if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and _is_custom(func):
            raise NotImplementedError(
                f'jvp="func" returns a zero tangent through the custom operator {func}; use jvp="dual"'
            )
        return func(*args, **kwargs)


def _is_custom(operator: Any) -> bool:
    packet = getattr(operator, "overloadpacket", operator)
    return packet._qualified_op_name.split("::")[0] not in ("aten", "prim", "prims")


def _standardise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    y = x_hat if weight is None else x_hat * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    shape = tuple(normalized_shape)
    return _affine(_standardise(input, tuple(range(-len(shape), 0)), eps), weight, bias, shape)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    if training and running_mean is not None:
        raise NotImplementedError('jvp="func" cannot update the running statistics of batch_norm; use jvp="dual"')
    return _from_statistics(input, (0, *range(2, input.ndim)), running_mean, running_var, weight, bias, training, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    if use_input_stats and running_mean is not None:
        raise NotImplementedError('jvp="func" cannot update the running statistics of instance_norm; use jvp="dual"')
    dims = tuple(range(2, input.ndim))
    return _from_statistics(input, dims, running_mean, running_var, weight, bias, use_input_stats, eps)


def _from_statistics(
    x: Tensor,
    dims: tuple[int, ...],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    eps: float,
) -> Tensor:
    shape = (1, x.shape[1], *[1] * (x.ndim - 2))
    if use_input_stats or running_mean is None or running_var is None:
        return _affine(_standardise(x, dims, eps), weight, bias, shape)
    return _affine((x - running_mean.view(shape)) * torch.rsqrt(running_var + eps).view(shape), weight, bias, shape)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        raise NotImplementedError('jvp="func" does not implement enable_gqa; repeat key and value heads instead')
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = scale * query @ key.mT
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        bias = attn_mask
        logits = logits.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else logits + bias
    return F.dropout(torch.softmax(logits, -1), dropout_p) @ value


_COMPOSITIONS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _instance_norm,
    F.scaled_dot_product_attention: _attention,
}
