"""Arithmetic and products: sums, quotients, powers, matrix products, einsum."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from mmf_fast.dual import no_tangent, primal, register_rule, tangent, tangent_scope
from mmf_fast.rules.common import add_tangents, linear_in_first, match, pointwise, rule, spellings

linear_in_first("neg", "negative", "positive")


@rule("add")
@register_rule(operator.add)
def add(a: Any, b: Any, *, alpha: Any = 1) -> tuple[Any, Any]:
    y = primal(a) + (primal(b) if alpha == 1 else alpha * primal(b))
    with tangent_scope(a, b):
        db = tangent(b)
        return y, match(add_tangents(tangent(a), db if db is None or alpha == 1 else alpha * db), y)


@rule("sub", "subtract")
@register_rule(operator.sub)
def sub(a: Any, b: Any, *, alpha: Any = 1) -> tuple[Any, Any]:
    y = primal(a) - (primal(b) if alpha == 1 else alpha * primal(b))
    with tangent_scope(a, b):
        da, db = tangent(a), tangent(b)
        if db is None:
            return y, match(da, y)
        db = db if alpha == 1 else alpha * db
        return y, match(-db if da is None else da - db, y)


@rule("rsub")
def rsub(a: Any, b: Any, *, alpha: Any = 1) -> tuple[Any, Any]:
    return sub(b, a, alpha=alpha)


@rule("div", "divide", "true_divide")
@register_rule(operator.truediv)
def div(a: Any, b: Any, *, rounding_mode: str | None = None) -> tuple[Any, Any]:
    """d(a/b) = (da - (a/b) db) / b."""
    if rounding_mode is not None:
        return torch.div(primal(a), primal(b), rounding_mode=rounding_mode), None
    y = primal(a) / primal(b)
    with tangent_scope(a, b):
        da, db = tangent(a), tangent(b)
        numerator = add_tangents(da, None if db is None else -y * db)
        return y, match(numerator / primal(b), y)


@rule("pow", "float_power")
@register_rule(operator.pow)
def power(a: Any, b: Any) -> tuple[Any, Any]:
    """d(a^b) = b a^(b-1) da + a^b log(a) db; at a = 0 the second term is 0, as in autograd."""
    x, n = primal(a), primal(b)
    y = torch.pow(x, n)
    with tangent_scope(a, b):
        da, db = tangent(a), tangent(b)
        from_base = None
        if da is not None:
            slope = n * torch.pow(x, n - 1)
            if isinstance(n, torch.Tensor):
                slope = torch.where(n == 0, 0.0, slope)
            elif n == 0:
                slope = torch.zeros_like(x)
            from_base = da * slope
        if db is None:
            return y, match(from_base, y)
        log_x = torch.log(torch.as_tensor(x, dtype=y.dtype, device=y.device))
        from_exponent = db * torch.where(y == 0, 0.0, y * log_x)
        return y, match(add_tangents(from_base, from_exponent), y)


@rule("maximum", "fmax")
def maximum(a: Any, b: Any) -> tuple[Any, Any]:
    """Ties share the tangent, as autograd's do."""
    return _select(torch.maximum(primal(a), primal(b)), a, b)


@rule("minimum", "fmin")
def minimum(a: Any, b: Any) -> tuple[Any, Any]:
    return _select(torch.minimum(primal(a), primal(b)), a, b)


def _select(y: torch.Tensor, a: Any, b: Any) -> tuple[Any, Any]:
    with tangent_scope(a, b):
        is_a, is_b = (y == primal(a)).to(y.dtype), (y == primal(b)).to(y.dtype)
        total = is_a + is_b
        da, db = tangent(a), tangent(b)
        terms = (None if da is None else da * is_a / total, None if db is None else db * is_b / total)
        return y, match(add_tangents(*terms), y)


def multilinear(function: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A product, linear in each tensor argument: the sum of f with one argument replaced by its tangent."""

    def product(*factors: Any, **kwargs: Any) -> tuple[Any, Any]:
        primals = [primal(x) for x in factors]
        y = function(*primals, **kwargs)
        with tangent_scope(*factors):
            terms = [
                function(*primals[:i], dx, *primals[i + 1 :], **kwargs)
                for i, dx in enumerate(map(tangent, factors))
                if dx is not None
            ]
            return y, match(add_tangents(*terms), y)

    return product


register_rule(operator.mul, *spellings("mul", "multiply"))(multilinear(operator.mul))
register_rule(operator.matmul, *spellings("matmul"), torch.Tensor.__matmul__)(multilinear(torch.matmul))
for _name in ("mm", "bmm", "mv", "dot", "inner", "outer", "ger", "kron", "cross", "vdot", "chain_matmul"):
    for _function in spellings(_name):
        register_rule(_function)(multilinear(_function))


@rule("einsum")
def einsum(equation: str, *operands: Any) -> tuple[Any, Any]:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    return multilinear(lambda *tensors: torch.einsum(equation, *tensors))(*operands)


@rule("tensordot")
def tensordot(a: Any, b: Any, dims: Any = 2) -> tuple[Any, Any]:
    return multilinear(lambda a, b: torch.tensordot(a, b, dims=dims))(a, b)


def _add_product(name: str, product: Callable[..., Any]) -> None:
    # beta * input + alpha * (a @ b): torch.addmm and its kin.
    @rule(name)
    def add_product(input: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> tuple[Any, Any]:
        function = getattr(torch, name)
        y = function(primal(input), primal(a), primal(b), beta=beta, alpha=alpha)
        with tangent_scope(input, a, b):
            d_input, da, db = tangent(input), tangent(a), tangent(b)
            terms = (
                None if d_input is None else beta * d_input,
                None if da is None else alpha * product(da, primal(b)),
                None if db is None else alpha * product(primal(a), db),
            )
            return y, match(add_tangents(*terms), y)


_add_product("addmm", torch.mm)
_add_product("addmv", torch.mv)
_add_product("addr", torch.outer)
_add_product("baddbmm", torch.bmm)
_add_product("addbmm", lambda a, b: torch.bmm(a, b).sum(0))


@rule("addcmul")
def addcmul(input: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    return input + value * (a * b)


@rule("addcdiv")
def addcdiv(input: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    return input + value * (a / b)


@rule("lerp")
def lerp(start: Any, end: Any, weight: Any) -> Any:
    return start + weight * (end - start)


@rule("atan2", "arctan2")
def atan2(a: Any, b: Any) -> tuple[Any, Any]:
    """d atan2(a, b) = (b da - a db) / (a^2 + b^2)."""
    y = torch.atan2(primal(a), primal(b))
    with tangent_scope(a, b):
        da, db = tangent(a), tangent(b)
        terms = (None if da is None else primal(b) * da, None if db is None else -primal(a) * db)
        return y, match(add_tangents(*terms) / (primal(a) ** 2 + primal(b) ** 2), y)


@pointwise("clamp", "clip")
def clamp(dx: Any, x: Any, y: Any, min: Any = None, max: Any = None) -> Any:
    inside = torch.ones_like(x, dtype=torch.bool)
    if min is not None:
        inside = inside & (x >= min)
    if max is not None:
        inside = inside & (x <= max)
    return torch.where(inside, dx, 0.0)


no_tangent(
    *(getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne", "floordiv", "mod")),
    *spellings("lt", "le", "gt", "ge", "eq", "ne", "less", "less_equal", "greater", "greater_equal", "not_equal"),
    *spellings("isclose", "allclose", "equal", "isnan", "isinf", "isfinite", "logical_not", "logical_and", "logical_or"),
    *spellings("sign", "sgn", "floor", "ceil", "round", "trunc", "fix", "floor_divide"),
    *spellings("heaviside", "signbit", "bucketize", "searchsorted"),
)
