"""Normalisation layers. With x^ = (x - mean) / sqrt(var + eps), over the normalised elements,

    d x^ = (dx - mean(dx) - x^ mean(x^ dx)) / sqrt(var + eps).

torch.func.jvp treats mean and variance as constants when this tangent is differentiated again (layer, batch and
instance norm), so its gradient through the tangent is wrong; here they are functions of x. The Jacobian is symmetric:
without a graph (SG_0) the fused backward kernels compute the tangent in one pass. Statistics are taken in float32 at
least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmf_fast.forward.buffers import LIVE
from mmf_fast.forward.dual import DetachedDual, Dual, Value, primal, register_rule, tangent, tangent_scope, unwatched
from mmf_fast.forward.missing import missing_rule_error
from mmf_fast.forward.rules.families import (
    add_tangents,
    as_autocast,
    constant_arguments,
    forward_derivative,
    keeps_tangent,
)
from mmf_fast.ops.dispatch import serve
from mmf_fast.ops.group_norm import group_norm_silu
from mmf_fast.ops.layer_norm import layer_norm_tangent, modulated_layer_norm, per_row

aten = torch.ops.aten


def _statistics_dtype(x: Value) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _standardised(x: Tensor, dx: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """x^ and its tangent, in the dtype of the statistics."""
    x, dx = x.to(_statistics_dtype(x)), dx.to(_statistics_dtype(x))
    centred = x - x.mean(dims, keepdim=True)
    r_std = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    x_hat = centred * r_std
    dx = dx - dx.mean(dims, keepdim=True)
    return x_hat, r_std * (dx - x_hat * (x_hat * dx).mean(dims, keepdim=True))


def _affine_tangent(x_hat: Value, d_hat: Value, weight: Value, bias: Value, shape: Sequence[int]) -> Any:
    """d(weight x^ + bias) = weight dx^ + dweight x^ + dbias, with weight and bias viewed as `shape`."""

    def view(p: Any) -> Any:
        return None if p is None else p.view(shape)

    w, dw, db = view(primal(weight)), view(tangent(weight)), view(tangent(bias))
    if d_hat is not None and w is not None:
        d_hat = d_hat * w
    return add_tangents(d_hat, None if dw is None else dw * x_hat, db)


def _has_parameter_tangent(weight: Value, bias: Value) -> bool:
    return tangent(weight) is not None or tangent(bias) is not None


@register_rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    input: Value, normalized_shape: Sequence[int], weight: Value = None, bias: Value = None, eps: float = 1e-5, *_: Any
) -> tuple[Any, Any]:
    shape = tuple(normalized_shape)
    if len(shape) == 1 and (pair := _fused_layer_norm(input, weight, bias, eps)) is not None:
        return pair
    x = primal(input)
    dx: Any = tangent(input)
    dims = tuple(range(-len(shape), 0))
    y = F.layer_norm(x, shape, primal(weight), primal(bias), eps)
    with tangent_scope(input, weight, bias):
        if _has_parameter_tangent(weight, bias):
            x_hat, d_hat = _standardised(x, torch.zeros_like(x) if dx is None else dx, dims, eps)
        else:
            x_hat, d_hat = None, layer_norm_tangent(x.to(y.dtype), dx.to(y.dtype), shape, eps)
        return y, _affine_tangent(x_hat, d_hat, weight, bias, shape)


def _fused_layer_norm(
    input: Value, weight: Value, bias: Value, eps: float, rms: bool = False
) -> tuple[Any, Any] | None:
    """y and its tangent from one operator, where there is one for these arguments."""
    args = [as_autocast(a) for a in (input, weight, bias)]
    if not serve("modulated_layer_norm", *args):
        return None
    (x, dx), (gain, dgain), (shift, dshift) = ((primal(a), tangent(a)) for a in args)
    if not (per_row(gain, x) and per_row(shift, x)):
        return None
    return modulated_layer_norm(x, dx, gain, dgain, shift, dshift, rms=rms, eps=eps, tangent_grad=keeps_tangent(*args))


def fused_modulated_norm(norm: Any, x: Value, shift: Value, scale: Value) -> Any:
    """norm(x) (1 + scale) + shift in one operator, for a layer norm without parameters over the last dimension.

    None where it does not apply: another norm, no Dual, torch.compile (which fuses by itself), and while plain tensors
    have tangents, which only functions of torch know.
    """
    plain = _is(norm, nn.LayerNorm) and norm.weight is None and len(norm.normalized_shape) == 1
    if not plain or not _fuses(x, shift, scale):
        return None
    gain = 1 + scale
    with unwatched():
        pair = _fused_layer_norm(x, gain, shift, norm.eps)
    return None if pair is None else _dual_like(pair, x, shift, scale)


def _is(norm: Any, kind: type[nn.Module]) -> bool:
    """Whether a module computes what this kind does: one derived from it may compute something else."""
    return isinstance(norm, kind) and getattr(norm.forward, "__func__", None) is kind.forward


def _fuses(*args: Value) -> bool:
    """Whether a network may name a fused operator itself: on Duals, and where nobody has to see functions of torch."""
    return not torch.compiler.is_compiling() and not LIVE and any(isinstance(a, Dual) for a in args)


def _dual_like(pair: tuple[Any, Any], *args: Value) -> Dual:
    """Result and tangent as a Dual of the kind that the arguments are."""
    return (Dual if keeps_tangent(*args) else DetachedDual)(*pair)


@register_rule(F.rms_norm, torch.rms_norm)
def rms_norm(
    input: Value, normalized_shape: Sequence[int], weight: Value = None, eps: float | None = None
) -> tuple[Any, Any]:
    """x^ = x / sqrt(mean(x^2) + eps), d x^ = (dx - x^ mean(x^ dx)) / sqrt(mean(x^2) + eps)."""
    if input.dtype.is_complex:
        return forward_derivative(F.rms_norm, (input, normalized_shape, weight, eps), {})
    shape = tuple(normalized_shape)
    dims = tuple(range(-len(shape), 0))
    epsilon = torch.finfo(_statistics_dtype(input)).eps if eps is None else eps  # as PyTorch's kernels have it
    if len(shape) == 1 and (pair := _fused_layer_norm(input, weight, None, epsilon, rms=True)) is not None:
        return pair
    y = F.rms_norm(primal(input), shape, primal(weight), eps)
    with tangent_scope(input, weight):
        x = primal(input)
        x = x.to(_statistics_dtype(x))
        r_rms = torch.rsqrt(x.square().mean(dims, keepdim=True) + epsilon)
        x_hat, d_hat = x * r_rms, None
        if (dx := tangent(input)) is not None:
            dx = dx.to(x.dtype)
            d_hat = r_rms * (dx - x_hat * (x_hat * dx).mean(dims, keepdim=True))
        return y, _affine_tangent(x_hat, d_hat, weight, None, shape)


@register_rule(F.group_norm, torch.group_norm)
def group_norm(
    input: Value, num_groups: int, weight: Value = None, bias: Value = None, eps: float = 1e-5, *_: Any
) -> tuple[Any, Any]:
    if (pair := _fused_group_norm([as_autocast(a) for a in (input, weight, bias)], num_groups, eps)) is not None:
        return pair
    x = primal(input)
    dx: Any = tangent(input)
    batch, channels, *spatial = x.shape
    shape = (1, channels, *[1] * len(spatial))
    y = F.group_norm(x, num_groups, primal(weight), primal(bias), eps)
    with tangent_scope(input, weight, bias):
        if torch.is_grad_enabled() or _has_parameter_tangent(weight, bias):
            grouped = (batch, num_groups, -1)
            dx = torch.zeros_like(x) if dx is None else dx
            x_hat, d_hat = _standardised(x.reshape(grouped), dx.reshape(grouped), (-1,), eps)
            x_hat, d_hat = x_hat.view(x.shape), d_hat.view(x.shape)
        else:
            x, dx, x_hat = x.to(y.dtype).contiguous(), dx.to(y.dtype).contiguous(), None
            pixels = x[0, 0].numel()
            mean, r_std = torch.native_group_norm(x, None, None, batch, channels, pixels, num_groups, eps)[1:]
            d_hat = aten.native_group_norm_backward(
                dx, x, mean, r_std, None, batch, channels, pixels, num_groups, [True, False, False]
            )[0]
        return y, _affine_tangent(x_hat, d_hat, weight, bias, shape)


def _fused_group_norm(args: Sequence[Value], groups: int, eps: float, silu: bool = False) -> tuple[Any, Any] | None:
    """y and its tangent from one operator, where there is one for these input, weight and bias."""
    if not serve("group_norm_silu", *args):
        return None
    (x, dx), (gain, dgain), (shift, dshift) = ((primal(a), tangent(a)) for a in args)
    return group_norm_silu(
        x, dx, groups, gain, dgain, shift, dshift, eps=eps, silu=silu, tangent_grad=keeps_tangent(*args)
    )


def fused_norm_silu(norm: Any, x: Value, shift: Value = None, scale: Value = None) -> Any:
    """silu(norm(x) (1 + scale) + shift) in one operator, for a group norm; shift and scale: (B, C, 1, ...), or absent.

    None where it does not apply, as in `fused_modulated_norm`. Autocast would have it in float32, for a convolution
    that takes 16 bits again: x of 16 bits stays so where the kernel takes it beside weights in float32, in which it
    computes.
    """
    if not _is(norm, nn.GroupNorm) or not _fuses(x, shift, scale):
        return None
    gain, bias = norm.weight, norm.bias
    if scale is not None:
        factor, column = 1 + scale, (-1, *[1] * (x.ndim - 2))
        gain = factor if gain is None else factor * gain.view(column)
        bias = shift if bias is None else factor * bias.view(column) + shift
    with unwatched():
        args = (x, gain, bias)
        pair = _fused_group_norm(args, norm.num_groups, norm.eps, silu=True)
        if pair is None:
            pair = _fused_group_norm([as_autocast(a) for a in args], norm.num_groups, norm.eps, silu=True)
    return None if pair is None else _dual_like(pair, x, shift, scale)


@register_rule(F.batch_norm)
def batch_norm(
    input: Value,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Value = None,
    bias: Value = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> tuple[Any, Any]:
    """Batch statistics in training, running statistics (constants) in evaluation."""
    constant_arguments(F.batch_norm, (running_mean, running_var))
    x = primal(input)
    if x.ndim < 2:
        raise missing_rule_error(F.batch_norm, "a tensor without a dimension of channels has none, unsqueeze it")
    y = F.batch_norm(x, running_mean, running_var, primal(weight), primal(bias), training, momentum, eps)
    dims = (0, *range(2, x.ndim))
    with tangent_scope(input, weight, bias):
        return y, _with_statistics(input, dims, running_mean, running_var, weight, bias, training, eps)


@register_rule(F.instance_norm)
def instance_norm(
    input: Value,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Value = None,
    bias: Value = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> tuple[Any, Any]:
    constant_arguments(F.instance_norm, (running_mean, running_var))
    x = primal(input)
    y = F.instance_norm(x, running_mean, running_var, primal(weight), primal(bias), use_input_stats, momentum, eps)
    dims = tuple(range(2, x.ndim))
    with tangent_scope(input, weight, bias):
        return y, _with_statistics(input, dims, running_mean, running_var, weight, bias, use_input_stats, eps).to(
            y.dtype
        )


def _with_statistics(
    input: Value,
    dims: tuple[int, ...],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Value,
    bias: Value,
    use_input_stats: bool,
    eps: float,
) -> Tensor:
    x, dx = primal(input), tangent(input)
    shape = (1, x.shape[1], *[1] * (x.ndim - 2))
    dx = torch.zeros_like(x) if dx is None else dx
    if use_input_stats or running_mean is None or running_var is None:
        x_hat, d_hat = _standardised(x, dx, dims, eps)
    else:
        r_std = torch.rsqrt(running_var + eps).view(shape)
        x_hat, d_hat = (x - running_mean.view(shape)) * r_std, dx * r_std
    return _affine_tangent(x_hat, d_hat, weight, bias, shape)


@register_rule(torch.batch_norm)
def torch_batch_norm(
    input: Value, weight: Value, bias: Value, mean: Value, var: Value, *options: Any
) -> tuple[Any, Any]:
    return batch_norm(input, mean, var, weight, bias, *options)


@register_rule(torch.instance_norm)
def torch_instance_norm(
    input: Value, weight: Value, bias: Value, mean: Value, var: Value, *options: Any
) -> tuple[Any, Any]:
    return instance_norm(input, mean, var, weight, bias, *options)
