"""What the rules share: the spellings of an operation, sums of tangents, and rules that hold for a whole family."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmf_fast.forward.dual import DetachedDual, Rule, missing_rule_error, primal, register_rule, tangent, tangent_scope
from mmf_fast.ops.dispatch import fused

# Where PyTorch keeps the same operation under the same name and argument order.
_NAMESPACES = (torch, Tensor, F, torch.special, torch.linalg)


def spellings(*names: str) -> list[Any]:
    """Every function and method of these names that this PyTorch has: torch.exp, Tensor.exp, ..."""
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


def constant_arguments(function: Any, arguments: Iterable[Any]) -> None:
    """Refuse a tangent where a rule would drop it."""
    if any(tangent(x) is not None for x in arguments):
        raise missing_rule_error(function, "only its first argument may be a Dual")


def linear_in_first(*names: str) -> None:
    """Operations linear in their first argument, the others constant: d f(x, ...) = f(dx, ...)."""
    for function in spellings(*names):
        _linear_in_first(function)


def _linear_in_first(function: Any) -> None:
    @register_rule(function)
    def linear_rule(input: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        constant_arguments(function, (*args, *kwargs.values()))
        y = function(input.primal, *args, **kwargs)
        with tangent_scope(input):
            return y, function(input.tangent, *args, **kwargs)


def linear_by_example(*names: str) -> None:
    """Linear operations whose other argument gives only shape or dtype: view_as, to, ..."""
    for function in spellings(*names):
        _linear_by_example(function)


def _linear_by_example(function: Any) -> None:
    @register_rule(function)
    def example_rule(input: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        args, kwargs = tuple(map(primal, args)), {name: primal(value) for name, value in kwargs.items()}
        y, dx = function(primal(input), *args, **kwargs), tangent(input)
        if dx is None or not isinstance(y, Tensor) or not y.is_floating_point():
            return y, None
        with tangent_scope(input):
            return y, function(dx, *args, **kwargs)


def pointwise(*names: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Elementwise functions of one tensor, from their tangent: decorates `d(dx, x, y, *args) -> dy`.

    Autocast may compute y wider than x; then x and dx arrive in y's dtype.
    """

    def register(derivative: Callable[..., Tensor]) -> Callable[..., Tensor]:
        for function in spellings(*names):
            _pointwise(function, derivative)
        return derivative

    return register


def _pointwise(function: Any, derivative: Callable[..., Tensor]) -> None:
    @register_rule(function)
    def pointwise_rule(input: Any, *args: Any, inplace: bool = False, **kwargs: Any) -> tuple[Any, Any]:
        if inplace:
            raise in_place_error(function)
        constant_arguments(function, (*args, *kwargs.values()))
        y = function(input.primal, *args, **kwargs)
        with tangent_scope(input):
            return y, derivative(input.tangent.to(y.dtype), input.primal.to(y.dtype), y, *args, **kwargs)


def fusable(name: str, *args: Any) -> bool:
    """Whether the operator mmf_fast::name should serve these tensors and Duals: one dtype, see ops/dispatch.py."""
    tensors = [x for arg in args for x in (primal(arg), tangent(arg)) if x is not None]
    return len({x.dtype for x in tensors}) == 1 and fused(name, *tensors)


def keeps_tangent(*args: Any) -> bool:
    """Whether a rule computes a tangent in the autograd graph (SG_1): the tangent_grad of the fused operators."""
    return not any(isinstance(x, DetachedDual) for x in args)


def autocasts(device_type: str) -> bool:
    """Whether autocast is on; torch.is_autocast_enabled refuses to say for "meta"."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def as_autocast(x: Any) -> Any:
    """x, a Dual, a tensor or None, in float32 where autocast is on, as for PyTorch's own norms."""
    return x.float() if x is not None and autocasts(primal(x).device.type) else x


def in_place_error(function: Any) -> Exception:
    """The error for inplace=True."""
    return missing_rule_error(function, "a Dual is immutable, build the module with inplace=False")
