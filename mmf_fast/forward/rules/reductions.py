"""Sums, moments, products, extrema, order statistics, norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmf_fast.forward.dual import missing_rule_error, register_rule, tangent_scope
from mmf_fast.forward.rules.families import linear_in_first, rule

linear_in_first("sum", "mean", "cumsum", "trace")


def _dims(x: Any, dim: Any) -> tuple[int, ...]:
    if isinstance(dim, int):
        return (dim,)
    return tuple(dim) if dim else tuple(range(x.ndim))


# -- moments: var = sum((x - mean)^2) / (n - correction) ---------------------------------------------------------------


@rule("var")
def var(input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None) -> Any:
    if isinstance(dim, bool):  # torch.var(x, unbiased)
        dim, unbiased = None, dim
    correction = int(unbiased) if correction is None else correction
    x, dims = input.primal, _dims(input, dim)
    y = torch.var(x, dims, correction=correction, keepdim=keepdim)
    with tangent_scope(input):
        centred = x - x.mean(dims, keepdim=True)
        count = x.numel() // max(y.numel(), 1)
        return y, 2 / (count - correction) * (centred * input.tangent).sum(dims, keepdim=keepdim)


@rule("std")
def std(input: Any, *args: Any, **kwargs: Any) -> Any:
    y, d_var = torch.std(input.primal, *args, **kwargs), var(input, *args, **kwargs)[1]
    with tangent_scope(input):
        return y, d_var / (2 * y)


def _with_mean(moment: Any) -> Any:
    def with_mean(input: Any, *args: Any, **kwargs: Any) -> Any:
        y, dy = moment(input, *args, **kwargs)
        dim = args[0] if args else kwargs.get("dim")
        keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        mean = input.mean(_dims(input, None if isinstance(dim, bool) else dim), keepdim=keepdim)
        return (y, mean.primal), (dy, mean.tangent)

    return with_mean


rule("var_mean")(_with_mean(var))
rule("std_mean")(_with_mean(std))


# -- products and logarithms of sums -----------------------------------------------------------------------------------


@rule("prod")
def prod(input: Any, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """d prod = sum_i dx_i prod_{j != i} x_j, without dividing by x."""
    if dim is None:
        input, dim, keepdim = input.flatten(), 0, False
    if dtype is not None:
        input = input.to(dtype)
    x = input.primal
    y = x.prod(dim, keepdim=keepdim)
    with tangent_scope(input):
        ones, others = torch.ones_like(x.narrow(dim, 0, 1)), x.shape[dim] - 1
        before = torch.cat([ones, x.cumprod(dim).narrow(dim, 0, others)], dim)
        after = torch.cat([ones, x.flip(dim).cumprod(dim).narrow(dim, 0, others)], dim).flip(dim)
        return y, (input.tangent * before * after).sum(dim, keepdim=keepdim)


@rule("logsumexp")
def logsumexp(input: Any, dim: Any, keepdim: bool = False) -> tuple[Any, Any]:
    x = input.primal
    y = torch.logsumexp(x, dim, keepdim=keepdim)
    with tangent_scope(input):
        weights = torch.exp(x - torch.logsumexp(x, dim, keepdim=True))
        return y, (weights * input.tangent).sum(dim, keepdim=keepdim)


# -- extrema and order statistics: the tangent follows the index; ties share it where autograd shares it ---------------


def _along_indices(input: Any, result: Any, dim: int, reduced: bool) -> tuple[Any, Any]:
    with tangent_scope(input):
        if not reduced:
            return result, (input.tangent.gather(dim, result.indices), None)
        return result, (input.tangent.gather(dim, result.indices.unsqueeze(dim)).squeeze(dim), None)


def _order_statistic(name: str) -> None:
    # Over one dimension (values and indices) or over all; max and min also of two tensors.
    function = getattr(torch, name)

    def over_dim(input: Any, dim: int, keepdim: bool = False) -> tuple[Any, Any]:
        return _along_indices(input, function(input.primal, dim, keepdim=keepdim), dim, reduced=not keepdim)

    @rule(name)
    def order_statistic(input: Any, *args: Any, **kwargs: Any) -> Any:
        if (args and not isinstance(args[0], int)) or "other" in kwargs:
            return getattr(torch, f"{name}imum")(input, *args, **kwargs)
        if args or kwargs:
            return over_dim(input, *args, **kwargs)
        if name in ("max", "min"):
            return getattr(torch, f"a{name}")(input)
        (y, _), (dy, _) = over_dim(input.flatten(), 0)
        return y, dy


for _name in ("max", "min", "median", "nanmedian"):
    _order_statistic(_name)


@rule("kthvalue")
def kthvalue(input: Any, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Any, Any]:
    return _along_indices(input, torch.kthvalue(input.primal, k, dim, keepdim), dim, reduced=not keepdim)


@rule("sort")
def sort(input: Any, dim: int = -1, descending: bool = False, *, stable: bool = False) -> tuple[Any, Any]:
    result = torch.sort(input.primal, dim=dim, descending=descending, stable=stable)
    return _along_indices(input, result, dim, reduced=False)


@rule("topk")
def topk(input: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Any, Any]:
    return _along_indices(input, torch.topk(input.primal, k, dim, largest, sorted), dim, reduced=False)


@rule("cummax")
def cummax(input: Any, dim: int) -> tuple[Any, Any]:
    return _along_indices(input, torch.cummax(input.primal, dim), dim, reduced=False)


@rule("cummin")
def cummin(input: Any, dim: int) -> tuple[Any, Any]:
    return _along_indices(input, torch.cummin(input.primal, dim), dim, reduced=False)


def _extremum_over(name: str) -> None:
    function = getattr(torch, name)

    @rule(name)
    def extremum(input: Any, dim: Any = (), keepdim: bool = False) -> tuple[Any, Any]:
        dims = _dims(input, dim)
        y = function(input.primal, dims, keepdim=True)
        with tangent_scope(input):
            ties = (input.primal == y).to(y.dtype)
            dy = (input.tangent * ties).sum(dims, keepdim=keepdim) / ties.sum(dims, keepdim=keepdim)
        return y if keepdim else function(input.primal, dims), dy


_extremum_over("amax")
_extremum_over("amin")


# -- norms: ||x||_p = (sum |x|^p)^(1/p) --------------------------------------------------------------------------------


@register_rule(torch.linalg.vector_norm)
def vector_norm(x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """d ||x||_2 = sum(x dx) / ||x||_2, and 0 at the origin, as in autograd."""
    x = x if dtype is None else x.to(dtype)
    dims = _dims(x, dim)
    if ord in (2, "fro"):
        y = torch.linalg.vector_norm(x.primal, 2, dims, keepdim)
        with tangent_scope(x):
            product = (x.primal * x.tangent).sum(dims, keepdim=keepdim)
            return y, torch.where(y == 0, 0.0, product / torch.where(y == 0, 1.0, y))
    size = torch.abs(x)
    if ord == 1:
        return size.sum(dims, keepdim=keepdim)
    if ord == math.inf:
        return size.amax(dims, keepdim=keepdim)
    if ord == -math.inf:
        return size.amin(dims, keepdim=keepdim)
    if ord == 0:
        raise missing_rule_error(torch.linalg.vector_norm, "the 0-norm counts elements and has no tangent")
    return (size**ord).sum(dims, keepdim=keepdim) ** (1 / ord)


@register_rule(torch.norm, Tensor.norm)
def norm(input: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    if p == "nuc":
        raise missing_rule_error(torch.norm, "the nuclear norm has no rule, only vector norms do")
    return vector_norm(input, 2 if p is None else p, dim, keepdim, dtype=dtype)


@register_rule(torch.linalg.norm)
def linalg_norm(A: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    over_matrices = len(dim) == 2 if isinstance(dim, tuple) else dim is None and A.ndim == 2
    if ord == "nuc" or (over_matrices and ord not in (None, "fro")):
        raise missing_rule_error(torch.linalg.norm, "matrix norms other than Frobenius have no rule")
    return vector_norm(A, 2 if ord is None else ord, dim, keepdim, **kwargs)


@rule("normalize")
def normalize(input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> Any:
    return input / torch.linalg.vector_norm(input, p, dim, keepdim=True).clamp_min(eps)


@rule("cosine_similarity")
def cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    """sum(x1 x2) / (max(||x1||, eps) max(||x2||, eps))."""

    def size(x: Any) -> Any:
        return torch.linalg.vector_norm(x, 2, dim).clamp_min(eps)

    return (x1 * x2).sum(dim) / (size(x1) * size(x2))


@rule("pairwise_distance")
def pairwise_distance(x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    return torch.linalg.vector_norm(x1 - x2 + eps, p, -1, keepdim)
