"""Arithmetic of two tensors: sums, products, quotients, powers, remainders, extrema."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmf_fast.forward.dual import Dual, Value, no_tangent, primal, register_rule, tangent, tangent_scope
from mmf_fast.forward.rules.families import add_tangents, forward_derivative, linear_in_first, rule, spellings

linear_in_first("neg", "negative", "positive")


def _fresh(input: Value, other: Value, dy: Tensor | None) -> Tensor | None:
    """dy, which is the tangent of one of the two where the other has none, as memory of its own: so is their sum."""
    return dy.clone() if dy is tangent(input) or dy is tangent(other) else dy  # type: ignore[union-attr]


@rule("add")
@register_rule(operator.add)
def add(input: Value, other: Value, *, alpha: Any = 1) -> tuple[Any, Any]:
    a, b = primal(input), primal(other)
    with tangent_scope(input, other):
        db = tangent(other)
        dy = _fresh(input, other, add_tangents(tangent(input), db if db is None or alpha == 1 else alpha * db))
    return a + (b if alpha == 1 else alpha * b), dy


@rule("sub", "subtract")
@register_rule(operator.sub)
def sub(input: Value, other: Value, *, alpha: Any = 1) -> tuple[Any, Any]:
    a, b = primal(input), primal(other)
    with tangent_scope(input, other):
        da, db = tangent(input), tangent(other)
        if db is None:
            dy = _fresh(input, other, da)
        else:
            db = db if alpha == 1 else alpha * db
            dy = -db if da is None else da - db
    return a - (b if alpha == 1 else alpha * b), dy


@rule("rsub")
def rsub(input: Value, other: Value, *, alpha: Any = 1) -> tuple[Any, Any]:
    return sub(other, input, alpha=alpha)


@rule("mul", "multiply")
@register_rule(operator.mul)
def mul(input: Value, other: Value) -> tuple[Any, Any]:
    a, b = primal(input), primal(other)
    with tangent_scope(input, other):
        da, db = tangent(input), tangent(other)
        dy = add_tangents(None if da is None else da * b, None if db is None else a * db)
    return a * b, dy


@rule("div", "divide", "true_divide")
@register_rule(operator.truediv)
def div(input: Value, other: Value, *, rounding_mode: str | None = None) -> tuple[Any, Any]:
    """d(a/b) = (da - (a/b) db) / b."""
    a, b = primal(input), primal(other)
    if rounding_mode is not None:
        return torch.div(a, b, rounding_mode=rounding_mode), None
    y = a / b
    with tangent_scope(input, other):
        da, db = tangent(input), tangent(other)
        numerator = add_tangents(da, None if db is None else -y * db)
        return y, numerator / b


@rule("pow")
def power(input: Value, exponent: Value) -> tuple[Any, Any]:
    """d x^n = n x^(n-1) dx for a constant n; 0 for x = n = 0."""
    x, n = primal(input), primal(exponent)
    if tangent(exponent) is not None or any(torch.is_complex(a) for a in (x, n) if isinstance(a, Tensor)):
        return forward_derivative(torch.pow, (input, exponent), {})
    with tangent_scope(input):
        n = n.long() if isinstance(n, Tensor) and n.dtype == torch.bool else n
        base = torch.where((x == 0) & (n == 0), 1.0, x) if isinstance(n, Tensor) or n == 0 else x
        dy = n * torch.pow(base, n - 1) * input.tangent
    return torch.pow(x, n), dy


@rule("float_power")
def float_power(input: Value, exponent: Value) -> Any:
    def wide(x: Value) -> Any:
        return x.to(torch.promote_types(x.dtype, torch.float64)) if isinstance(x, (Tensor, Dual)) else x

    return torch.pow(wide(input), wide(exponent))


@rule("logaddexp")
def logaddexp(input: Value, other: Value) -> tuple[Any, Any]:
    """d log(e^a + e^b) = sig(a - b) da + sig(b - a) db; 0 for a - b where both are the same infinity."""
    a, b = primal(input), primal(other)
    if a.is_complex() or b.is_complex():
        return forward_derivative(torch.logaddexp, (input, other), {})
    y = torch.logaddexp(a, b)
    with tangent_scope(input, other):
        gap = torch.where(a.isinf() & (a == b), 0.0, a - b)
        da, db = tangent(input), tangent(other)
        dy = add_tangents(
            None if da is None else torch.sigmoid(gap) * da, None if db is None else torch.sigmoid(-gap) * db
        )
        return y, dy


@rule("remainder")
@register_rule(operator.mod)
def remainder(input: Value, other: Value) -> tuple[Any, Any]:
    return _modulo(torch.remainder, input, other)


@rule("fmod")
def fmod(input: Value, other: Value) -> tuple[Any, Any]:
    return _modulo(torch.fmod, input, other)


def _modulo(function: Callable[..., Tensor], input: Value, other: Value) -> tuple[Any, Any]:
    if not isinstance(primal(input), Tensor):  # PyTorch has no derivative of number % tensor
        input = torch.full((), input, dtype=other.dtype, device=other.device)
    y, dy = forward_derivative(function, (input, other), {})
    return y, dy.clone()  # of x % number it is the tangent of x itself


# Comparisons and integer quotients: piecewise constant.
no_tangent(
    *(getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne", "floordiv")),
    *spellings("lt", "le", "gt", "ge", "eq", "ne", "less", "less_equal", "greater", "greater_equal", "not_equal"),
    *spellings("isclose", "allclose", "equal", "logical_and", "logical_or", "logical_xor", "floor_divide"),
)
