"""What the rules share: the spellings of an operation, sums of tangents, and rules that hold for a whole family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmf_fast.dual import Rule, missing_rule, primal, register_rule, tangent, tangent_scope

# Where PyTorch keeps the same operation under the same name and argument order.
_NAMESPACES = (torch, Tensor, F, torch.special, torch.linalg)


def spellings(*names: str) -> list[Any]:
    """Every function and method of that name: torch.exp, Tensor.exp, torch.special.exp, ..."""
    found = [getattr(space, name) for name in names for space in _NAMESPACES if callable(getattr(space, name, None))]
    return list(dict.fromkeys(found))


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under all spellings of the names."""
    return register_rule(*spellings(*names))


def add_tangents(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are not symbolic zeros."""
    present = [term for term in terms if term is not None]
    if not present:
        return None
    return sum(present[1:], start=present[0])


def match(dy: Tensor | None, y: Tensor) -> Tensor | None:
    """Give a tangent the shape and dtype of its primal, after broadcasting or type promotion."""
    if dy is None:
        return None
    return dy.to(y.dtype).expand(y.shape)


def linear_in_first(*names: str) -> None:
    """Operations linear in their first argument and constant in the others: d f(x, ...) = f(dx, ...)."""
    for function in spellings(*names):
        _linear_in_first(function)


def _linear_in_first(function: Any) -> None:
    @register_rule(function)
    def linear_rule(x: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        args, kwargs = tuple(map(primal, args)), {name: primal(value) for name, value in kwargs.items()}
        y = function(primal(x), *args, **kwargs)
        if tangent(x) is None:
            return y, None
        with tangent_scope(x):
            return y, function(tangent(x), *args, **kwargs)


def pointwise(*names: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Elementwise functions of one tensor, from their tangent: decorates `d(dx, x, y, *args) -> dy`."""

    def register(derivative: Callable[..., Tensor]) -> Callable[..., Tensor]:
        for function in spellings(*names):
            _pointwise(function, derivative)
        return derivative

    return register


def _pointwise(function: Any, derivative: Callable[..., Tensor]) -> None:
    @register_rule(function)
    def pointwise_rule(input: Any, *args: Any, inplace: bool = False, **kwargs: Any) -> tuple[Any, Any]:
        if inplace:
            raise missing_rule(function, "a Dual is immutable, build the module with inplace=False")
        y = function(input.primal, *args, **kwargs)
        with tangent_scope(input):
            return y, derivative(input.tangent, input.primal, y, *args, **kwargs)
