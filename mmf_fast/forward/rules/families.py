"""What the rules share: the spellings of an operation, sums of tangents, and rules that hold for a whole family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmf_fast.forward.dual import DetachedDual, Dual, Rule, Value, primal, register_rule, tangent, tangent_scope
from mmf_fast.forward.missing import missing_rule_error

# Where PyTorch keeps the same operation under the same name and argument order.
_NAMESPACES = (torch, Tensor, F, torch.special, torch.linalg, torch.fft)


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
    def linear_rule(input: Value, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
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
    def example_rule(input: Value, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        args, kwargs = tuple(map(primal, args)), {name: primal(value) for name, value in kwargs.items()}
        y, dx = function(primal(input), *args, **kwargs), tangent(input)
        if dx is None or not isinstance(y, Tensor) or not (y.is_floating_point() or y.is_complex()):
            return y, None
        with tangent_scope(input):
            return y, function(dx, *args, **kwargs)


def pointwise(*names: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Elementwise functions of one real tensor, from their tangent: decorates `d(dx, x, y, *args) -> dy`.

    Autocast may compute y wider than x; then x and dx arrive in y's dtype. Complex tensors and other arguments that
    move take PyTorch's derivative.
    """

    def register(derivative: Callable[..., Tensor]) -> Callable[..., Tensor]:
        for function in spellings(*names):
            _pointwise(function, derivative)
        return derivative

    return register


def _pointwise(function: Any, derivative: Callable[..., Tensor]) -> None:
    @register_rule(function)
    def pointwise_rule(input: Value, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if input.dtype.is_complex or any(isinstance(x, Dual) for x in (input, *args, *kwargs.values())[1:]):
            return forward_derivative(function, (input, *args), kwargs)
        y = function(input.primal, *args, **kwargs)
        with tangent_scope(input):
            return y, derivative(input.tangent.to(y.dtype), input.primal.to(y.dtype), y, *args, **kwargs)


# -- PyTorch's own forward derivative of one function ------------------------------------------------------------------


def by_pytorch(*functions: Any, in_graph: bool = True) -> None:
    """Functions whose tangent PyTorch's own forward derivative gives rightly.

    in_graph: so it does the gradient through that tangent; otherwise they serve SG_0 only.
    """
    for function in functions:
        register_rule(function)(_by_pytorch(function, in_graph))


def _by_pytorch(function: Any, in_graph: bool) -> Rule:
    def rule_of_pytorch(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not in_graph and not any(isinstance(x, DetachedDual) for x in _duals((*args, *kwargs.values()))):
            raise missing_rule_error(
                function,
                "PyTorch's gradient through its tangent is wrong or missing: use tangent_grad=False (lambda 0), "
                "other functions, or teach it with mmf_fast.register_rule",
            )
        return forward_derivative(function, args, kwargs)

    return rule_of_pytorch


# What a RuntimeError of PyTorch says of a function, or of one of its arguments, that has no derivative.
_NOT_DIFFERENTIABLE = ("not differentiable with respect to", "does not support automatic differentiation")


def forward_derivative(function: Callable[..., Any], args: tuple, kwargs: dict) -> tuple[Any, Any]:
    """(y, dy) of function(*args, **kwargs) by torch.func.jvp of it in the Duals among its arguments.

    One evaluation, so that a random function draws once. With a DetachedDual, dy has no graph (SG_0).
    """
    moving = [x for x in _duals((*args, *kwargs.values())) if x.tangent is not None]
    detached = any(isinstance(x, DetachedDual) for x in moving)

    def of_moving(*values: Tensor) -> Any:
        rest = iter(values)
        return function(*_replaced(args, rest), **{name: _replaced(value, rest) for name, value in kwargs.items()})

    tangents = tuple(x.tangent.detach() if detached else x.tangent for x in moving)  # type: ignore[union-attr]
    try:
        y, dy = torch.func.jvp(of_moving, tuple(x.primal for x in moving), tangents)  # type: ignore[misc]
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, NotImplementedError) or any(reason in str(error) for reason in _NOT_DIFFERENTIABLE):
            raise missing_rule_error(
                function, "PyTorch does not differentiate it in this argument, teach it with register_rule"
            ) from error
        raise
    return y, _detached(dy) if detached else dy


def _duals(x: Value) -> Iterator[Dual]:
    if isinstance(x, Dual):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from _duals(item)


def _replaced(x: Value, values: Iterator[Tensor]) -> Any:
    """x with the next value in place of each Dual that has a tangent, in the order of `_duals`."""
    if isinstance(x, Dual):
        return x.primal if x.tangent is None else next(values)
    if isinstance(x, (list, tuple)):
        items = [_replaced(item, values) for item in x]
        return items if isinstance(x, list) else tuple(items)
    return x


def _detached(dy: Any) -> Any:
    if isinstance(dy, (list, tuple)):
        items = [_detached(item) for item in dy]
        return items if type(dy) is list else tuple(items)
    if not isinstance(dy, Tensor):
        return dy
    is_symbolic = not torch.compiler.is_compiling() and dy._is_zerotensor()  # a zero of PyTorch that has no memory
    return dy.detach().clone() if is_symbolic else dy.detach()


def keeps_tangent(*args: Any) -> bool:
    """Whether a rule computes a tangent in the autograd graph (SG_1): the tangent_grad of the fused operators."""
    return not any(isinstance(x, DetachedDual) for x in args)


def autocasts(device_type: str) -> bool:
    """Whether autocast is on; torch.is_autocast_enabled refuses to say for "meta"."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def as_autocast(x: Value) -> Any:
    """x, a Dual, a tensor or None, in float32 where autocast is on, as for PyTorch's own norms."""
    return x.float() if x is not None and autocasts(primal(x).device.type) else x
