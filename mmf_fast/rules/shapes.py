"""Views, indexing, joining and conversions: linear operations, applied to primal and tangent alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmf_fast.dual import no_tangent, primal, tangent, tangent_scope
from mmf_fast.rules.common import linear_in_first, match, rule, spellings

linear_in_first("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel")
linear_in_first("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "adjoint", "flip", "fliplr")
linear_in_first("flipud", "roll", "rot90", "expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile")
linear_in_first("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow", "select", "unfold", "fold")
linear_in_first("index_select", "gather", "take", "take_along_dim", "diagonal", "diag", "diag_embed", "tril", "triu")
linear_in_first("as_strided", "__getitem__", "masked_select")
linear_in_first("clone", "contiguous", "to", "type_as", "float", "double", "half", "bfloat16", "cuda", "cpu")
linear_in_first("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "alias")

no_tangent(
    *spellings("size", "dim", "numel", "nelement", "stride", "element_size", "is_contiguous", "storage_offset"),
    *spellings("is_floating_point", "is_complex", "get_device", "data_ptr", "result_type", "is_same_size", "ndimension"),
    *spellings("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"),
    *spellings("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "nonzero", "argwhere"),
    *spellings("detach", "int", "long", "bool", "byte", "short", "char"),
)


# -- joining -----------------------------------------------------------------------------------------------------------


def _tangents_or_zeros(tensors: Sequence[Any]) -> list[Tensor]:
    return [torch.zeros_like(primal(x)) if tangent(x) is None else tangent(x) for x in tensors]


def _join(function: Callable[..., Any], tensors: Sequence[Any], **kwargs: Any) -> tuple[Any, Any]:
    y = function([primal(x) for x in tensors], **kwargs)
    with tangent_scope(*tensors):
        return y, function(_tangents_or_zeros(tensors), **kwargs)


@rule("cat", "concat", "concatenate")
def cat(tensors: Sequence[Any], dim: int = 0, *, axis: int | None = None, out: None = None) -> tuple[Any, Any]:
    return _join(torch.cat, tensors, dim=dim if axis is None else axis)


@rule("stack")
def stack(tensors: Sequence[Any], dim: int = 0, *, out: None = None) -> tuple[Any, Any]:
    return _join(torch.stack, tensors, dim=dim)


for _name in ("hstack", "vstack", "dstack", "column_stack", "row_stack"):
    rule(_name)(lambda tensors, *, out=None, function=getattr(torch, _name): _join(function, tensors))


@rule("broadcast_tensors")
def broadcast_tensors(*tensors: Any) -> tuple[Any, Any]:
    ys = torch.broadcast_tensors(*map(primal, tensors))
    with tangent_scope(*tensors):
        return ys, tuple(match(tangent(x), y) for x, y in zip(tensors, ys, strict=True))


@rule("meshgrid")
def meshgrid(*tensors: Any, indexing: str | None = None) -> tuple[Any, Any]:
    tensors = tuple(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)) else tensors
    indexing = indexing or "ij"
    ys = torch.meshgrid(*map(primal, tensors), indexing=indexing)
    with tangent_scope(*tensors):
        return ys, torch.meshgrid(*_tangents_or_zeros(tensors), indexing=indexing)


# -- choosing and filling ----------------------------------------------------------------------------------------------


def _tangent_like(x: Any, y: Tensor) -> Any:
    return 0.0 if tangent(x) is None else tangent(x).to(y.dtype)


@rule("where")
def where(condition: Any, input: Any, other: Any) -> tuple[Any, Any]:
    condition = primal(condition)
    y = torch.where(condition, primal(input), primal(other))
    with tangent_scope(input, other):
        return y, match(torch.where(condition, _tangent_like(input, y), _tangent_like(other, y)), y)


@rule("masked_fill")
def masked_fill(input: Any, mask: Any, value: Any) -> tuple[Any, Any]:
    return where(mask, value, input)


def _scatter_like(name: str) -> None:
    # index_add, scatter, ...: linear in (input, source) together, for fixed indices.
    function = getattr(torch, name)

    @rule(name)
    def scatter_rule(input: Any, dim: int, index: Tensor, source: Any, **kwargs: Any) -> tuple[Any, Any]:
        if kwargs.get("reduce") is not None:
            raise ValueError(f"{name} with reduce={kwargs['reduce']!r} has no tangent rule; use scatter_add")
        y = function(primal(input), dim, index, primal(source), **kwargs)
        with tangent_scope(input, source):
            d_input = torch.zeros_like(y) if tangent(input) is None else tangent(input)
            d_source = tangent(source)
            if d_source is None:
                d_source = torch.zeros_like(primal(source)) if isinstance(primal(source), Tensor) else 0.0
            return y, function(d_input, dim, index, d_source, **kwargs)


for _name in ("scatter", "scatter_add", "index_add", "index_copy"):
    _scatter_like(_name)


@rule("pad")
def pad(input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> tuple[Any, Any]:
    y = F.pad(input.primal, pad, mode, value)
    with tangent_scope(input):
        return y, F.pad(input.tangent, pad, mode)
