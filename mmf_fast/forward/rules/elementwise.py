"""Elementwise functions of one tensor: d f(x) = f'(x) dx."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmf_fast.forward.dual import no_tangent
from mmf_fast.forward.rules.families import pointwise, spellings

# f'(x), given x and y = f(x), of what networks call in every block; the others are in by_pytorch.py.
_DERIVATIVES = {
    "exp": lambda x, y: y,
    "log": lambda x, y: 1 / x,
    "sqrt": lambda x, y: 0.5 / y,
    "rsqrt": lambda x, y: -0.5 * y / x,
    "square": lambda x, y: 2 * x,
    "reciprocal": lambda x, y: -y * y,
    "sin": lambda x, y: torch.cos(x),
    "cos": lambda x, y: -torch.sin(x),
    "abs": lambda x, y: torch.sign(x),
    "frac": lambda x, y: 1.0,
    "absolute": lambda x, y: torch.sign(x),
}

for _name, _derivative in _DERIVATIVES.items():
    pointwise(_name)(lambda dx, x, y, f=_derivative: dx * f(x, y))


@pointwise("sinc")
def sinc(dx: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """sin(z)/z with z = pi x, whose derivative has a Taylor series where (cos z - sin z / z) / z loses its digits."""
    z = math.pi * x
    near_zero = z.abs() < 1e-2
    away = torch.where(near_zero, 1.0, z)
    slope = (torch.cos(away) - torch.sin(away) / away) / away
    series = z * (-1 / 3 + z * z * (1 / 30 - z * z / 840))
    return math.pi * dx * torch.where(near_zero, series, slope)


# Piecewise constant, or not numbers at all.
no_tangent(
    *spellings("sign", "floor", "ceil", "round", "trunc", "fix", "heaviside", "signbit"),
    *spellings("isnan", "isinf", "isfinite", "isposinf", "isneginf", "isreal", "isin", "logical_not"),
    *spellings("bernoulli", "bucketize", "searchsorted"),
)
