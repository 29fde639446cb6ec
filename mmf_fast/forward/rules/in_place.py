"""Writing into a Dual: in-place methods, `inplace=True`, `x[...] = y`, `x += y`.

A rule gives a fresh tangent to a fresh primal and the same view of the tangent to a view of the primal, so writing
primal and tangent alike is what PyTorch does to a tensor and all that shares its memory.
"""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmf_fast.forward.buffers import WRITES
from mmf_fast.forward.dual import (
    _RULES,
    DetachedDual,
    Dual,
    Rule,
    Value,
    known_functions,
    primal,
    register_rule,
    tangent,
    tangent_scope,
)
from mmf_fast.forward.missing import missing_rule_error
from mmf_fast.forward.rules.families import spellings

# They change shape or graph, not the values; or draw, where the function of that name draws differently.
_NOT_A_WRITE = {
    *("transpose_", "t_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "as_strided_", "detach_", "bernoulli_")
}

_OPERATORS = {
    **{"add": "add_", "sub": "sub_", "mul": "mul_", "truediv": "div_", "pow": "pow_"},
    **{"mod": "remainder_", "floordiv": "floor_divide_"},
}


def written(function: Any, x: Value, y: Any) -> tuple[Tensor, Tensor | None]:
    """Writes y into x, both Duals or tensors of one shape; returns the parts of x."""
    _refuse_what_cannot_be_written(function, x, y)
    if primal(y).shape != x.shape or (primal(y).is_complex() and not x.dtype.is_complex):
        fix = f"its result, {tuple(y.shape)} of {y.dtype}, does not fit into {tuple(x.shape)} of {x.dtype}"
        raise missing_rule_error(function, fix)
    x.primal.copy_(primal(y))
    with tangent_scope(x):
        _write_tangent(x.tangent, tangent(y))
    return x.primal, x.tangent


def _write_tangent(dx: Tensor | None, dy: Tensor | None) -> None:
    if dx is not None:
        dx.zero_() if dy is None else dx.copy_(dy)


def _refuse_what_cannot_be_written(function: Any, x: Value, y: Any) -> None:
    if not isinstance(x, Dual) or (x.tangent is None and tangent(y) is not None):
        raise missing_rule_error(function, "a tensor without a tangent cannot take a Dual, use the out-of-place form")
    if isinstance(y, DetachedDual) and not isinstance(x, DetachedDual):
        raise missing_rule_error(function, "the tangent written to is in the graph, the one written is not")
    for part in (x.primal, x.tangent):
        if part is None:
            continue
        if torch.is_grad_enabled() and part.requires_grad and part.is_leaf:
            raise missing_rule_error(
                function, "a leaf that requires grad cannot be written to, use the out-of-place form"
            )
        if any(step == 0 and size > 1 for step, size in zip(part.stride(), part.shape, strict=True)):
            raise missing_rule_error(function, "expanded memory cannot be written to, clone it first")


def _copy(x: Value) -> Any:
    # Where there is a graph: it may keep what it was computed from, which must not change.
    return type(x)(x.primal.clone(), None if x.tangent is None else x.tangent.clone()) if isinstance(x, Dual) else x


def _writes(in_place: Any, function: Any) -> None:
    WRITES.add(in_place)

    @register_rule(in_place)
    def write(input: Value, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not isinstance(input, Dual):
            _refuse_what_cannot_be_written(in_place, input, None)
        return written(in_place, input, function(_copy(input), *args, **kwargs))


@register_rule(Tensor.copy_)
def copy_(input: Value, src: Value, non_blocking: bool = False) -> tuple[Any, Any]:
    if not isinstance(input, Dual):
        _refuse_what_cannot_be_written(Tensor.copy_, input, src)
    src = src.to(input.dtype) if isinstance(src, (Tensor, Dual)) else src
    return written(Tensor.copy_, input, src.expand(input.shape))


@register_rule(Tensor.zero_, torch.zero_)
def zero_(input: Value) -> tuple[Any, Any]:
    return written(Tensor.zero_, input, torch.zeros_like(input.primal))


@register_rule(Tensor.__setitem__)
def setitem(input: Value, index: Any, value: Value) -> tuple[Any, Any]:
    _refuse_what_cannot_be_written(Tensor.__setitem__, input, value)
    input.primal[index] = primal(value)
    with tangent_scope(input):
        if input.tangent is not None:
            input.tangent[index] = 0.0 if tangent(value) is None else tangent(value)
    return input.primal, input.tangent


# -- inplace=True ------------------------------------------------------------------------------------------------------


def _with_inplace(function: FunctionType, rule: Rule) -> None:
    position = list(inspect.signature(function).parameters).index("inplace")

    @register_rule(function)
    def with_inplace(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        inplace = kwargs.pop("inplace", False)
        if len(args) > position:
            inplace, args = args[position], (*args[:position], *args[position + 1 :])
        if not inplace:
            return rule(*args, **kwargs)
        return written(function, args[0], function(_copy(args[0]), *args[1:], **kwargs))

    with_inplace.__name__ = rule.__name__


def register() -> None:
    """Adds what writes to the rules there are."""
    for name in dir(Tensor):
        if name.endswith("_") and name not in _NOT_A_WRITE and getattr(Tensor, name[:-1], None) in known_functions():
            for space in (Tensor, torch, F):
                if callable(getattr(space, name, None)):
                    _writes(getattr(space, name), getattr(Dual, name[:-1]))
    for in_place in (Tensor.fill_, torch.fill_):  # there is no Tensor.fill
        _writes(in_place, torch.fill)
    WRITES.update((Tensor.copy_, Tensor.zero_, Tensor.__setitem__))
    for name in ("celu", "elu", "hardtanh", "leaky_relu", "rrelu", "selu", "threshold"):
        for in_place in spellings(f"{name}_"):
            _writes(in_place, getattr(F, name))
    for function, rule in list(_RULES.items()):
        if isinstance(function, FunctionType) and "inplace" in inspect.signature(function).parameters:
            _with_inplace(function, rule)
    _writes(Tensor.__ipow__, torch.pow)  # which is not Tensor.pow_
    for name, method in _OPERATORS.items():  # without these Python takes x + y for x += y, and no view is written to
        setattr(Dual, f"__i{name}__", lambda self, other, method=method: getattr(self, method)(other))
