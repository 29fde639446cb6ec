"""Joining, selecting, gathering and scattering: linear for fixed indices and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmf_fast.forward.dual import Value, no_tangent, primal, register_rule, tangent, tangent_scope
from mmf_fast.forward.rules.families import linear_in_first, rule, spellings
from mmf_fast.forward.rules.shapes import tangent_or_zeros

linear_in_first("__getitem__", "narrow", "select", "index_select", "gather", "take", "take_along_dim", "masked_select")
no_tangent(*spellings("nonzero", "argwhere", "argmax", "argmin", "argsort", "any", "all", "count_nonzero"))
no_tangent(*spellings("one_hot", "multinomial"))


# -- joining -----------------------------------------------------------------------------------------------------------


def _join(function: Callable[..., Any], tensors: Sequence[Value], **kwargs: Any) -> tuple[Any, Any]:
    y = function([primal(x) for x in tensors], **kwargs)
    with tangent_scope(*tensors):
        return y, function([tangent_or_zeros(x) for x in tensors], **kwargs)


@rule("cat", "concat", "concatenate")
def cat(tensors: Sequence[Value], dim: int = 0, *, axis: int | None = None) -> tuple[Any, Any]:
    return _join(torch.cat, tensors, dim=dim if axis is None else axis)


@rule("stack")
def stack(tensors: Sequence[Value], dim: int = 0) -> tuple[Any, Any]:
    return _join(torch.stack, tensors, dim=dim)


for _function in spellings("hstack", "vstack", "dstack", "column_stack", "row_stack"):
    register_rule(_function)(lambda tensors, function=_function: _join(function, tensors))


# -- choosing ----------------------------------------------------------------------------------------------------------


@register_rule(torch.where)
def where(condition: Any, input: Value, other: Value) -> tuple[Any, Any]:
    chosen = primal(condition)
    y = torch.where(chosen, primal(input), primal(other))
    with tangent_scope(input, other):
        return y, torch.where(chosen, _tangent_or_zero(input, y), _tangent_or_zero(other, y))


def _tangent_or_zero(x: Value, y: Tensor) -> Any:
    dx = tangent(x)
    return 0.0 if dx is None else dx.to(y.dtype)


@register_rule(Tensor.where)
def where_method(input: Value, condition: Any, other: Value) -> tuple[Any, Any]:
    return where(condition, input, other)


@rule("masked_fill")
def masked_fill(input: Value, mask: Value, value: Value) -> tuple[Any, Any]:
    return where(mask, value, input)
