"""Products, linear in each factor: matmul and its kin, einsum, addmm and its kin."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmf_fast.forward.dual import Dual, Value, primal, register_rule, tangent, tangent_scope
from mmf_fast.forward.missing import missing_rule_error
from mmf_fast.forward.rules.families import add_tangents, rule, spellings
from mmf_fast.forward.teaching import operands_keep_their_order


def multilinear(function: Callable[..., Tensor], *factors: Value) -> tuple[Any, Any]:
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
    def product(input: Value, *factors: Value, **kwargs: Any) -> tuple[Any, Any]:
        if other in kwargs:
            factors = (kwargs.pop(other),)
        return multilinear(lambda a, b: function(a, b, **kwargs), input, *factors)


for _name, _other in {"matmul": "other", "mm": "mat2", "bmm": "mat2"}.items():
    for _function in spellings(_name):
        _product(_function, _other)
register_rule(operator.matmul)(lambda a, b: multilinear(torch.matmul, a, b))


@register_rule(Tensor.matmul)
def matmul_method(input: Value, other: Value) -> tuple[Any, Any]:
    if torch.compiler.is_dynamo_compiling() and not isinstance(input, Dual) and not operands_keep_their_order():
        raise missing_rule_error(
            Tensor.matmul, "torch.compile may swap the operands of @, call the network by mmf_fast.jvp"
        )
    return multilinear(torch.matmul, input, other)


@rule("einsum")
def einsum(equation: str, *operands: Value) -> tuple[Any, Any]:
    if not isinstance(equation, str):
        raise missing_rule_error(torch.einsum, "write the equation as a string")
    if len(operands) == 1 and type(operands[0]) in (list, tuple):
        operands = tuple(operands[0])
    return multilinear(lambda *tensors: torch.einsum(equation, *tensors), *operands)
