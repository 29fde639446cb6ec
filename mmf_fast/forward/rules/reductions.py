"""Standard deviation, norms and running products, by hand because of zeros, where PyTorch's second derivative is nan;
running sums of exponentials, where its first is wrong.

At zeros the tangent is 0, as autograd's gradient is, and so is the gradient through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmf_fast.forward.dual import Value, register_rule, tangent_scope
from mmf_fast.forward.missing import missing_rule_error
from mmf_fast.forward.rules.families import forward_derivative, rule


@rule("cumprod")
def cumprod(input: Value, dim: int, *, dtype: Any = None) -> Any:
    """No quotient, of which PyTorch's derivative at 0 is made."""
    return _running(torch.mul, input.clone() if dtype is None else input.to(dtype, copy=True), dim)


@rule("logcumsumexp")
def logcumsumexp(input: Value, dim: int) -> tuple[Any, Any]:
    """No exponential of a difference of more than two numbers, of which PyTorch's derivative is made."""
    if input.dtype.is_complex:
        raise missing_rule_error(torch.logcumsumexp, "of complex numbers it has none, teach it with register_rule")
    with tangent_scope(input):
        dy = _running(torch.logaddexp, input.clone(), dim).tangent
    return torch.logcumsumexp(input.primal, dim), dy


def _running(combined: Callable[[Value, Value], Value], y: Value, dim: int) -> Value:
    """y_i = x_1 o ... o x_i: after each step of twice as many entries."""
    size, reach = (y.shape[dim] if y.ndim else 1), 1
    while reach < size:
        rest = combined(y.narrow(dim, reach, size - reach), y.narrow(dim, 0, size - reach))
        y, reach = torch.cat([y.narrow(dim, 0, reach), rest], dim), 2 * reach
    return y


def _quotient(dy: Tensor, y: Tensor) -> Tensor:
    """dy / y, and 0 where y = 0."""
    return torch.where(y == 0, 0.0, dy / torch.where(y == 0, 1.0, y))


@rule("std")
def std(input: Value, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """d std = d var / (2 std)."""
    y, (_, d_var) = torch.std(input.primal, *args, **kwargs), forward_derivative(torch.var, (input, *args), kwargs)
    with tangent_scope(input):
        return y, _quotient(d_var, 2 * y)


@rule("std_mean")
def std_mean(input: Value, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    (y, mean), (_, d_mean) = forward_derivative(torch.std_mean, (input, *args), kwargs)
    return (y, mean), (std(input, *args, **kwargs)[1], d_mean)


@register_rule(torch.linalg.vector_norm)
def vector_norm(x: Value, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """d ||x||_2 = Re sum(conj(x) dx) / ||x||_2;   d ||x||_p = sum(sign(x) (|x| / ||x||_p)^(p-1) dx)."""
    by_hand = ord in (2, "fro") or (ord not in (0, math.inf, -math.inf) and not x.dtype.is_complex)
    if not by_hand:
        return forward_derivative(torch.linalg.vector_norm, (x, ord, dim, keepdim), {"dtype": dtype})
    p = 2 if ord == "fro" else ord
    dims = (dim,) if isinstance(dim, int) else tuple(dim) if dim is not None else tuple(range(x.ndim))
    x = x if dtype is None else x.to(dtype)
    y = torch.linalg.vector_norm(x.primal, p, dims, keepdim)
    with tangent_scope(x):
        if p == 2:
            product = x.primal.conj() * x.tangent if x.dtype.is_complex else x.primal * x.tangent
            product = product.sum(dims, keepdim=keepdim) if dims else product
            return y, _quotient(product.real if product.is_complex() else product, y)
        size = torch.linalg.vector_norm(x.primal, p, dims, keepdim=True)
        at_zero = (x.primal == 0) | (size == 0)
        part = torch.where(at_zero, 1.0, x.primal.abs()) / torch.where(size == 0, 1.0, size)
        terms = torch.where(at_zero, 0.0, x.primal.sign() * part ** (p - 1) * x.tangent)
        return y, terms.sum(dims, keepdim=keepdim) if dims else terms


@register_rule(torch.norm, Tensor.norm)
def norm(input: Value, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    if p == "nuc":
        return forward_derivative(torch.norm, (input, p, dim, keepdim), {"dtype": dtype})
    return vector_norm(input, 2 if p is None else p, dim, keepdim, dtype=dtype)


@register_rule(torch.linalg.norm)
def linalg_norm(A: Value, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dims = A.ndim if dim is None else 1 if isinstance(dim, int) else len(dim)
    if ord is None or (ord == "fro" if dims == 2 else dims < 2 and not isinstance(ord, str)):
        return vector_norm(A, 2 if ord is None else ord, dim, keepdim, dtype=dtype)
    return forward_derivative(torch.linalg.norm, (A, ord, dim, keepdim), {"dtype": dtype})


@rule("normalize")
def normalize(input: Value, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> Any:
    return input / _at_least(eps, torch.linalg.vector_norm(input, p, dim, keepdim=True))


@rule("cosine_similarity")
def cosine_similarity(x1: Value, x2: Value, dim: int = 1, eps: float = 1e-8) -> Any:
    """sum(x1 x2) / (max(||x1||, eps) max(||x2||, eps))."""
    x1, x2 = torch.broadcast_tensors(x1, x2)

    sizes = [_at_least(eps, torch.linalg.vector_norm(x, 2, dim)) for x in (x1, x2)]
    return (x1 * x2).sum(dim) / (sizes[0] * sizes[1])


def _at_least(eps: float, size: Any) -> Any:
    """max(size, eps), nan where size is; in eager mode quicker than clamp_min, whose rule is PyTorch's."""
    return torch.where(size < eps, eps, size)


@rule("pairwise_distance")
def pairwise_distance(x1: Value, x2: Value, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    return torch.linalg.vector_norm(x1 - x2 + eps, p, -1, keepdim)
