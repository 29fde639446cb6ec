"""Products, linear in each factor: matmul and its kin, einsum, addmm and its kin."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmf_fast.forward.dual import Dual, missing_rule_error, primal, register_rule, tangent, tangent_scope
from mmf_fast.forward.interception import operands_keep_their_order
from mmf_fast.forward.rules.families import add_tangents, rule, spellings


def multilinear(function: Callable[..., Tensor], *factors: Any) -> tuple[Any, Any]:
    """d f(a, b, ...) = f(da, b, ...) + f(a, db, ...) + ..."""
    primals = [primal(x) for x in factors]
    y = function(*primals)
    with tangent_scope(*factors):
        terms = [
            function(*primals[:i], dx, *primals[i + 1 :])
            for i, dx in enumerate(map(tangent, factors))
            if dx is not None
        ]
        return y, add_tangents(*terms)


def _product(function: Any, other: str) -> None:
    # `other`: what PyTorch calls the second factor.
    @register_rule(function)
    def product(input: Any, *factors: Any, **kwargs: Any) -> tuple[Any, Any]:
        if other in kwargs:
            factors = (kwargs.pop(other),)
        return multilinear(lambda a, b: function(a, b, **kwargs), input, *factors)


_SECOND_FACTORS = {
    "other": ("matmul", "inner", "kron", "vdot", "vecdot"),
    "mat2": ("mm", "bmm"),
    "vec": ("mv",),
    "tensor": ("dot",),
    "vec2": ("outer", "ger"),
}
for _other, _names in _SECOND_FACTORS.items():
    for _function in spellings(*_names):
        _product(_function, _other)
register_rule(operator.matmul)(lambda a, b: multilinear(torch.matmul, a, b))


@register_rule(Tensor.matmul)
def matmul_method(input: Any, other: Any) -> tuple[Any, Any]:
    if torch.compiler.is_dynamo_compiling() and not isinstance(input, Dual) and not operands_keep_their_order():
        raise missing_rule_error(
            Tensor.matmul, "torch.compile may swap the operands of @, call the network by mmf_fast.jvp"
        )
    return multilinear(torch.matmul, input, other)


def _cross(function: Any) -> None:
    # torch.cross and torch.linalg.cross have different default dimensions.
    @register_rule(function)
    def cross(input: Any, other: Any, *dim: Any, **kwargs: Any) -> tuple[Any, Any]:
        return multilinear(lambda a, b: function(a, b, *dim, **kwargs), input, other)


for _function in spellings("cross"):
    _cross(_function)


@rule("chain_matmul")
def chain_matmul(*matrices: Any) -> tuple[Any, Any]:
    return multilinear(lambda *factors: torch.linalg.multi_dot(factors), *matrices)


@rule("multi_dot")
def multi_dot(tensors: Any) -> tuple[Any, Any]:
    return chain_matmul(*tensors)


@rule("einsum")
def einsum(equation: str, *operands: Any) -> tuple[Any, Any]:
    if not isinstance(equation, str):
        raise missing_rule_error(torch.einsum, "write the equation as a string")
    if len(operands) == 1 and type(operands[0]) in (list, tuple):
        operands = tuple(operands[0])
    return multilinear(lambda *tensors: torch.einsum(equation, *tensors), *operands)


@rule("tensordot")
def tensordot(a: Any, b: Any, dims: Any = 2) -> tuple[Any, Any]:
    return multilinear(lambda a, b: torch.tensordot(a, b, dims=dims), a, b)


def _add_product(name: str, names: tuple[str, str], product: Callable[..., Tensor]) -> None:
    # beta * input + alpha * (a @ b): torch.addmm and its kin, whose factors are called `names`.
    function = getattr(torch, name)

    @rule(name)
    def add_product(input: Any, *factors: Any, beta: Any = 1, alpha: Any = 1, **kwargs: Any) -> tuple[Any, Any]:
        a, b = (*factors, *(kwargs[key] for key in names if key in kwargs))
        y = function(primal(input), primal(a), primal(b), beta=beta, alpha=alpha)
        with tangent_scope(input, a, b):
            d_input, da, db = tangent(input), tangent(a), tangent(b)
            terms = (
                None if d_input is None else beta * d_input,
                None if da is None else alpha * product(da, primal(b)),
                None if db is None else alpha * product(primal(a), db),
            )
            return y, add_tangents(*terms)


_add_product("addmm", ("mat1", "mat2"), torch.mm)
_add_product("addmv", ("mat", "vec"), torch.mv)
_add_product("addr", ("vec1", "vec2"), torch.outer)
_add_product("baddbmm", ("batch1", "batch2"), torch.bmm)
_add_product("addbmm", ("batch1", "batch2"), lambda a, b: torch.bmm(a, b).sum(0))
