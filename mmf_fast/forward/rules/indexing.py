"""Joining, selecting, gathering and scattering: linear for fixed indices and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmf_fast.forward.dual import missing_rule_error, no_tangent, primal, register_rule, tangent, tangent_scope
from mmf_fast.forward.rules.families import linear_in_first, rule, spellings
from mmf_fast.forward.rules.shapes import tangent_or_zeros

linear_in_first("__getitem__", "narrow", "select", "index_select", "gather", "take", "take_along_dim", "masked_select")
no_tangent(*spellings("nonzero", "argwhere", "argmax", "argmin", "argsort", "any", "all", "count_nonzero"))
no_tangent(*spellings("one_hot", "multinomial"))


# -- joining -----------------------------------------------------------------------------------------------------------


def _join(function: Callable[..., Any], tensors: Sequence[Any], **kwargs: Any) -> tuple[Any, Any]:
    y = function([primal(x) for x in tensors], **kwargs)
    with tangent_scope(*tensors):
        return y, function([tangent_or_zeros(x) for x in tensors], **kwargs)


@rule("cat", "concat", "concatenate")
def cat(tensors: Sequence[Any], dim: int = 0, *, axis: int | None = None) -> tuple[Any, Any]:
    return _join(torch.cat, tensors, dim=dim if axis is None else axis)


@rule("stack")
def stack(tensors: Sequence[Any], dim: int = 0) -> tuple[Any, Any]:
    return _join(torch.stack, tensors, dim=dim)


for _function in spellings("hstack", "vstack", "dstack", "column_stack", "row_stack"):
    register_rule(_function)(lambda tensors, function=_function: _join(function, tensors))


# -- choosing ----------------------------------------------------------------------------------------------------------


@register_rule(torch.where)
def where(condition: Any, input: Any, other: Any) -> tuple[Any, Any]:
    chosen = primal(condition)
    y = torch.where(chosen, primal(input), primal(other))
    with tangent_scope(input, other):
        return y, torch.where(chosen, _tangent_or_zero(input, y), _tangent_or_zero(other, y))


def _tangent_or_zero(x: Any, y: Tensor) -> Any:
    dx = tangent(x)
    return 0.0 if dx is None else dx.to(y.dtype)


@register_rule(Tensor.where)
def where_method(input: Any, condition: Any, other: Any) -> tuple[Any, Any]:
    return where(condition, input, other)


@rule("masked_fill")
def masked_fill(input: Any, mask: Any, value: Any) -> tuple[Any, Any]:
    return where(mask, value, input)


# -- writing -----------------------------------------------------------------------------------------------------------

_WRITES = {
    "scatter": ("input", "dim", "index", "src"),
    "scatter_add": ("input", "dim", "index", "src"),
    "index_add": ("input", "dim", "index", "source"),
    "index_copy": ("input", "dim", "index", "source"),
    "index_fill": ("input", "dim", "index", "value"),
    "index_put": ("input", "indices", "values", "accumulate"),
    "masked_scatter": ("input", "mask", "source"),
    "select_scatter": ("input", "src", "dim", "index"),
    "slice_scatter": ("input", "src", "dim", "start", "end", "step"),
    "diagonal_scatter": ("input", "src", "offset", "dim1", "dim2"),
}
_WRITTEN = ("input", "src", "source", "value", "values")


def _write(name: str, parameters: tuple[str, ...]) -> None:
    # Linear in the tensor written to and the values written, together.
    function = getattr(torch, name)

    @rule(name)
    def write(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
        if arguments.get("reduce") is not None:
            raise missing_rule_error(function, f"reduce={arguments['reduce']!r} has no rule, use scatter_add")
        if name == "scatter" and not isinstance(primal(arguments.get("src", 0.0)), Tensor):
            arguments["value"] = arguments.pop("src", arguments.get("value"))  # scatter(input, dim, index, number)
        y = function(**{key: primal(value) for key, value in arguments.items()})
        with tangent_scope(*arguments.values()):
            for key in _WRITTEN:
                if key in arguments:
                    value = arguments[key]
                    arguments[key] = tangent_or_zeros(value) if isinstance(primal(value), Tensor) else 0.0
            return y, function(**arguments)


for _name, _parameters in _WRITES.items():
    _write(_name, _parameters)
