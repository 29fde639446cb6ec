"""Sums, means, extrema, cumulative sums, norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmf_fast.dual import missing_rule, register_rule, tangent_scope
from mmf_fast.rules.common import linear_in_first, pointwise, rule

linear_in_first("sum", "mean", "nansum", "nanmean", "cumsum", "trace")


def _reduced(dy: Tensor, dim: Any, keepdim: bool) -> Tensor:
    return dy.sum() if dim is None else dy.sum(dim, keepdim=keepdim)


@rule("var")
def var(input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None) -> Any:
    """var = sum((x - mean)^2) / (n - correction)."""
    if isinstance(dim, bool):  # torch.var(x, unbiased)
        dim, unbiased = None, dim
    correction = int(unbiased) if correction is None else correction
    dims = tuple(range(input.ndim)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    count = 1
    for d in dims:
        count *= input.shape[d]
    centred = input - input.mean(dims, keepdim=True)
    return (centred * centred).sum(dims, keepdim=keepdim) / (count - correction)


@rule("std")
def std(input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None) -> Any:
    return torch.sqrt(var(input, dim, unbiased, keepdim, correction=correction))


@rule("var_mean")
def var_mean(input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None) -> Any:
    variance = var(input, dim, unbiased, keepdim, correction=correction)
    mean = input.mean() if dim is None or isinstance(dim, bool) else input.mean(dim, keepdim=keepdim)
    return (variance.primal, mean.primal), (variance.tangent, mean.tangent)


@rule("prod")
def prod(input: Any, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """d prod = sum_i dx_i prod_{j != i} x_j, without dividing by x."""
    x, dx = input.primal, input.tangent
    if dtype is not None:
        x, dx = x.to(dtype), dx.to(dtype)
    y = x.prod() if dim is None else x.prod(dim, keepdim=keepdim)
    with tangent_scope(input):
        dim_, x_, dx_ = (0, x.flatten(), dx.flatten()) if dim is None else (dim, x, dx)
        ones = torch.ones_like(x_.narrow(dim_, 0, 1))
        before = torch.cat([ones, x_.cumprod(dim_).narrow(dim_, 0, x_.shape[dim_] - 1)], dim_)
        after = torch.cat([ones, x_.flip(dim_).cumprod(dim_).narrow(dim_, 0, x_.shape[dim_] - 1)], dim_).flip(dim_)
        return y, _reduced(dx_ * before * after, dim_, keepdim and dim is not None)


@rule("logsumexp")
def logsumexp(input: Any, dim: Any, keepdim: bool = False) -> tuple[Any, Any]:
    x = input.primal
    y = torch.logsumexp(x, dim, keepdim=keepdim)
    with tangent_scope(input):
        weights = torch.exp(x - torch.logsumexp(x, dim, keepdim=True))
        return y, (weights * input.tangent).sum(dim, keepdim=keepdim)


def _extremum(name: str) -> None:
    # max, min: over one dimension the tangent follows the index; over all, ties share it, as in autograd.
    @rule(name)
    def extremum(input: Any, *args: Any, **kwargs: Any) -> Any:
        if (args and not isinstance(args[0], int)) or "other" in kwargs:
            return getattr(torch, f"{name}imum")(input, *args, **kwargs)
        function = getattr(torch, name)
        if args or kwargs:
            result = function(input.primal, *args, **kwargs)
            dim = args[0] if args else kwargs["dim"]
            keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
            with tangent_scope(input):
                indices = result.indices if keepdim else result.indices.unsqueeze(dim)
                dy = input.tangent.gather(dim, indices)
                return result, (dy if keepdim else dy.squeeze(dim), None)
        y = function(input.primal)
        with tangent_scope(input):
            ties = (input.primal == y).to(y.dtype)
            return y, (input.tangent * ties).sum() / ties.sum()


_extremum("max")
_extremum("min")


def _extremum_over(name: str) -> None:
    # amax, amin: ties share the tangent, as in autograd.
    function = getattr(torch, name)

    @rule(name)
    def extremum(input: Any, dim: Any = (), keepdim: bool = False) -> tuple[Any, Any]:
        dims = tuple(range(input.ndim)) if dim == () else dim
        y = function(input.primal, dims, keepdim=True)
        with tangent_scope(input):
            ties = (input.primal == y).to(y.dtype)
            dy = (input.tangent * ties).sum(dims, keepdim=keepdim) / ties.sum(dims, keepdim=keepdim)
        return y if keepdim else function(input.primal, dims), dy


_extremum_over("amax")
_extremum_over("amin")


@rule("sort")
def sort(input: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> tuple[Any, Any]:
    result = torch.sort(input.primal, dim=dim, descending=descending, stable=stable)
    with tangent_scope(input):
        return result, (input.tangent.gather(dim, result.indices), None)


@rule("topk")
def topk(input: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Any, Any]:
    result = torch.topk(input.primal, k, dim, largest, sorted)
    with tangent_scope(input):
        return result, (input.tangent.gather(dim, result.indices), None)


# -- norms: ||x||_p = (sum |x|^p)^(1/p) --------------------------------------------------------------------------------


def vector_norm(input: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: None = None) -> Any:
    """d ||x||_2 = sum(x dx) / ||x||_2, and 0 at the origin, as in autograd."""
    if dtype is not None:
        input = input.to(dtype)
    dims = tuple(range(input.ndim)) if dim is None else dim
    if ord in (2, "fro"):
        y = torch.linalg.vector_norm(input.primal, 2, dims, keepdim)
        with tangent_scope(input):
            product = (input.primal * input.tangent).sum(dims, keepdim=keepdim)
            return y, torch.where(y == 0, 0.0, product / torch.where(y == 0, 1.0, y))
    size = torch.abs(input)
    if ord == 1:
        return size.sum(dims, keepdim=keepdim)
    if ord == float("inf"):
        return size.amax(dims, keepdim=keepdim)
    if ord == float("-inf"):
        return size.amin(dims, keepdim=keepdim)
    return (size**ord).sum(dims, keepdim=keepdim) ** (1 / ord)


register_rule(torch.linalg.vector_norm)(vector_norm)


@register_rule(torch.norm, Tensor.norm)
def norm(input: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: None = None, dtype: Any = None) -> Any:
    if p == "nuc":
        raise missing_rule(torch.norm, "the nuclear norm has no rule, only vector norms do")
    return vector_norm(input, p, dim, keepdim, dtype=dtype)


@register_rule(torch.linalg.norm)
def linalg_norm(input: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    matrix = ord not in (None, "fro") and (len(dim) == 2 if isinstance(dim, tuple) else dim is None and input.ndim == 2)
    if matrix or ord == "nuc":
        raise missing_rule(torch.linalg.norm, "matrix norms other than Frobenius have no rule")
    return vector_norm(input, 2 if ord is None else ord, dim, keepdim, **kwargs)


@rule("normalize")
def normalize(input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: None = None) -> Any:
    return input / torch.linalg.vector_norm(input, p, dim, keepdim=True).clamp_min(eps)


@pointwise("clamp_min")
def clamp_min(dx: Tensor, x: Tensor, y: Tensor, min: Any) -> Tensor:
    return torch.where(x >= min, dx, 0.0)


@pointwise("clamp_max")
def clamp_max(dx: Tensor, x: Tensor, y: Tensor, max: Any) -> Tensor:
    return torch.where(x <= max, dx, 0.0)
