"""Elementwise functions of one tensor: d f(x) = f'(x) dx."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmf_fast.forward.dual import no_tangent, tangent_scope
from mmf_fast.forward.rules.families import pointwise, rule, spellings

_LN2, _LN10, _SQRT_PI = math.log(2), math.log(10), math.sqrt(math.pi)

# f'(x), given x and y = f(x).
_DERIVATIVES = {
    "exp": lambda x, y: y,
    "exp2": lambda x, y: y * _LN2,
    "expm1": lambda x, y: y + 1,
    "log": lambda x, y: 1 / x,
    "log2": lambda x, y: 1 / (x * _LN2),
    "log10": lambda x, y: 1 / (x * _LN10),
    "log1p": lambda x, y: 1 / (x + 1),
    "sqrt": lambda x, y: 0.5 / y,
    "rsqrt": lambda x, y: -0.5 * y / x,
    "square": lambda x, y: 2 * x,
    "reciprocal": lambda x, y: -y * y,
    "sin": lambda x, y: torch.cos(x),
    "cos": lambda x, y: -torch.sin(x),
    "tan": lambda x, y: 1 + y * y,
    "asin": lambda x, y: torch.rsqrt(1 - x * x),
    "acos": lambda x, y: -torch.rsqrt(1 - x * x),
    "atan": lambda x, y: 1 / (1 + x * x),
    "sinh": lambda x, y: torch.cosh(x),
    "cosh": lambda x, y: torch.sinh(x),
    "asinh": lambda x, y: torch.rsqrt(x * x + 1),
    "acosh": lambda x, y: torch.rsqrt(x - 1) * torch.rsqrt(x + 1),
    "atanh": lambda x, y: 1 / (1 - x * x),
    "abs": lambda x, y: torch.sign(x),
    "erf": lambda x, y: 2 / _SQRT_PI * torch.exp(-x * x),
    "erfc": lambda x, y: -2 / _SQRT_PI * torch.exp(-x * x),
    "erfinv": lambda x, y: _SQRT_PI / 2 * torch.exp(y * y),
    "lgamma": lambda x, y: torch.digamma(x),
    "digamma": lambda x, y: torch.polygamma(1, x),
    "deg2rad": lambda x, y: math.pi / 180,
    "rad2deg": lambda x, y: 180 / math.pi,
    "frac": lambda x, y: 1.0,
}
_ALIASES = {
    "abs": ("absolute",),
    "asin": ("arcsin",),
    "acos": ("arccos",),
    "atan": ("arctan",),
    "asinh": ("arcsinh",),
    "acosh": ("arccosh",),
    "atanh": ("arctanh",),
    "lgamma": ("gammaln",),
    "digamma": ("psi",),
}

for _name, _derivative in _DERIVATIVES.items():
    pointwise(_name, *_ALIASES.get(_name, ()))(lambda dx, x, y, f=_derivative: dx * f(x, y))


@rule("sinc")
def sinc(input: Any) -> tuple[Any, Any]:
    """sin(z)/z with z = pi x, whose derivative has a Taylor series where (cos z - sin z / z) / z loses its digits."""
    x, y = input.primal, torch.sinc(input.primal)
    with tangent_scope(input):
        z = math.pi * x
        near_zero = z.abs() < 1e-2
        away = torch.where(near_zero, 1.0, z)
        slope = (torch.cos(away) - torch.sin(away) / away) / away
        series = z * (-1 / 3 + z * z * (1 / 30 - z * z / 840))
        return y, math.pi * input.tangent * torch.where(near_zero, series, slope)


@rule("logit")
def logit(input: Any, eps: float | None = None) -> Any:
    """log(x / (1 - x)), with x clamped to [eps, 1 - eps]."""
    x = input if eps is None else input.clamp(eps, 1 - eps)
    return torch.log(x / (1 - x))


@pointwise("nan_to_num")
def nan_to_num(dx: Tensor, x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.where(torch.isfinite(x), dx, 0.0)


@pointwise("clamp", "clip")
def clamp(dx: Tensor, x: Tensor, y: Tensor, min: Any = None, max: Any = None) -> Tensor:
    inside = torch.ones_like(x, dtype=torch.bool)
    if min is not None:
        inside = inside & (x >= min)
    if max is not None:
        inside = inside & (x <= max)
    return torch.where(inside, dx, 0.0)


@pointwise("clamp_min")
def clamp_min(dx: Tensor, x: Tensor, y: Tensor, min: Any) -> Tensor:
    return torch.where(x >= min, dx, 0.0)


@pointwise("clamp_max")
def clamp_max(dx: Tensor, x: Tensor, y: Tensor, max: Any) -> Tensor:
    return torch.where(x <= max, dx, 0.0)


# Piecewise constant, or not numbers at all.
no_tangent(
    *spellings("sign", "sgn", "floor", "ceil", "round", "trunc", "fix", "heaviside", "signbit"),
    *spellings("isnan", "isinf", "isfinite", "isposinf", "isneginf", "isreal", "isin", "logical_not"),
    *spellings("bernoulli", "bucketize", "searchsorted"),
)
