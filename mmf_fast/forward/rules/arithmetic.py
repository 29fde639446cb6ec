"""Arithmetic of two tensors: sums, products, quotients, powers, remainders, extrema."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmf_fast.forward.dual import no_tangent, primal, register_rule, tangent, tangent_scope
from mmf_fast.forward.rules.families import add_tangents, linear_in_first, rule, spellings

linear_in_first("neg", "negative", "positive")


@rule("add")
@register_rule(operator.add)
def add(input: Any, other: Any, *, alpha: Any = 1) -> tuple[Any, Any]:
    a, b = primal(input), primal(other)
    with tangent_scope(input, other):
        db = tangent(other)
        dy = add_tangents(tangent(input), db if db is None or alpha == 1 else alpha * db)
    return a + (b if alpha == 1 else alpha * b), dy


@rule("sub", "subtract")
@register_rule(operator.sub)
def sub(input: Any, other: Any, *, alpha: Any = 1) -> tuple[Any, Any]:
    a, b = primal(input), primal(other)
    with tangent_scope(input, other):
        da, db = tangent(input), tangent(other)
        if db is None:
            dy = da
        else:
            db = db if alpha == 1 else alpha * db
            dy = -db if da is None else da - db
    return a - (b if alpha == 1 else alpha * b), dy


@rule("rsub")
def rsub(input: Any, other: Any, *, alpha: Any = 1) -> tuple[Any, Any]:
    return sub(other, input, alpha=alpha)


@rule("mul", "multiply")
@register_rule(operator.mul)
def mul(input: Any, other: Any) -> tuple[Any, Any]:
    a, b = primal(input), primal(other)
    with tangent_scope(input, other):
        da, db = tangent(input), tangent(other)
        dy = add_tangents(None if da is None else da * b, None if db is None else a * db)
    return a * b, dy


@rule("div", "divide", "true_divide")
@register_rule(operator.truediv)
def div(input: Any, other: Any, *, rounding_mode: str | None = None) -> tuple[Any, Any]:
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
def power(input: Any, exponent: Any) -> tuple[Any, Any]:
    """d(a^b) = b a^(b-1) da + a^b log(a) db; at a = 0 the second term is 0, as in autograd."""
    a, b = primal(input), primal(exponent)
    y = torch.pow(a, b)
    with tangent_scope(input, exponent):
        da, db = tangent(input), tangent(exponent)
        from_base = None if da is None else da * _slope(a, b)
        from_exponent = None
        if db is not None:
            safe = torch.where(y == 0, 1.0, torch.as_tensor(a, dtype=y.dtype, device=y.device))
            from_exponent = db * y * torch.log(safe)
        return y, add_tangents(from_base, from_exponent)


def _slope(a: Tensor, b: Any) -> Any:
    # b a^(b-1), without 0 * inf at a = b = 0.
    if isinstance(b, Tensor):
        return torch.where(b == 0, 0.0, b * torch.pow(a, torch.where(b == 0, 1.0, b - 1)))
    return 0.0 if b == 0 else b * torch.pow(a, b - 1)


@rule("remainder")
@register_rule(operator.mod)
def remainder(input: Any, other: Any) -> tuple[Any, Any]:
    """a mod b = a - b floor(a/b)."""
    return _modulo(torch.remainder, "floor", input, other)


@rule("fmod")
def fmod(input: Any, other: Any) -> tuple[Any, Any]:
    """fmod(a, b) = a - b trunc(a/b)."""
    return _modulo(torch.fmod, "trunc", input, other)


def _modulo(function: Callable[..., Tensor], rounding_mode: str, input: Any, other: Any) -> tuple[Any, Any]:
    a, b = primal(input), primal(other)
    with tangent_scope(input, other):
        db = tangent(other)
        from_other = None if db is None else -db * torch.div(a, b, rounding_mode=rounding_mode)
        dy = add_tangents(tangent(input), from_other)
    return function(a, b), dy


@rule("maximum")
def maximum(input: Any, other: Any) -> tuple[Any, Any]:
    """Ties share the tangent, as autograd's do."""
    return _select(torch.maximum(primal(input), primal(other)), input, other)


@rule("minimum")
def minimum(input: Any, other: Any) -> tuple[Any, Any]:
    return _select(torch.minimum(primal(input), primal(other)), input, other)


def _select(y: Tensor, a: Any, b: Any) -> tuple[Any, Any]:
    with tangent_scope(a, b):
        is_a, is_b = (y == primal(a)).to(y.dtype), (y == primal(b)).to(y.dtype)
        total = is_a + is_b
        da, db = tangent(a), tangent(b)
        terms = (None if da is None else da * is_a / total, None if db is None else db * is_b / total)
        return y, add_tangents(*terms)


@rule("addcmul")
def addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    return input + value * (tensor1 * tensor2)


@rule("addcdiv")
def addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    return input + value * (tensor1 / tensor2)


@rule("lerp")
def lerp(input: Any, end: Any, weight: Any) -> Any:
    return input + weight * (end - input)


@rule("atan2", "arctan2")
def atan2(input: Any, other: Any) -> tuple[Any, Any]:
    """d atan2(a, b) = (b da - a db) / (a^2 + b^2)."""
    a, b = primal(input), primal(other)
    with tangent_scope(input, other):
        da, db = tangent(input), tangent(other)
        terms = (None if da is None else b * da, None if db is None else -a * db)
        dy = add_tangents(*terms) / (a * a + b * b)
    return torch.atan2(a, b), dy


@rule("hypot")
def hypot(input: Any, other: Any) -> Any:
    return torch.sqrt(input * input + other * other)


@rule("logaddexp")
def logaddexp(input: Any, other: Any) -> tuple[Any, Any]:
    """d log(e^a + e^b) = sigmoid(a - b) da + sigmoid(b - a) db."""
    a, b = primal(input), primal(other)
    with tangent_scope(input, other):
        da, db = tangent(input), tangent(other)
        terms = (
            None if da is None else torch.sigmoid(a - b) * da,
            None if db is None else torch.sigmoid(b - a) * db,
        )
    return torch.logaddexp(a, b), add_tangents(*terms)


@rule("xlogy")
def xlogy(input: Any, other: Any) -> tuple[Any, Any]:
    """d(a log b) = log(b) da + (a/b) db."""
    a, b = primal(input), primal(other)
    with tangent_scope(input, other):
        da, db = tangent(input), tangent(other)
        dy = add_tangents(None if da is None else torch.xlogy(da, b), None if db is None else a / b * db)
    return torch.xlogy(a, b), dy


# Comparisons and integer quotients: piecewise constant.
no_tangent(
    *(getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne", "floordiv")),
    *spellings("lt", "le", "gt", "ge", "eq", "ne", "less", "less_equal", "greater", "greater_equal", "not_equal"),
    *spellings("isclose", "allclose", "equal", "logical_and", "logical_or", "logical_xor", "floor_divide"),
)
