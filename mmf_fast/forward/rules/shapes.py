"""Views, copies and conversions: linear operations, applied to primal and tangent alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmf_fast.forward.dual import Value, no_tangent, primal, register_rule, tangent, tangent_scope
from mmf_fast.forward.missing import missing_rule_error
from mmf_fast.forward.rules.families import linear_by_example, linear_in_first, rule, spellings

linear_in_first("sum", "mean", "cumsum", "trace")
linear_in_first("reshape", "flatten", "squeeze", "unsqueeze", "ravel", "alias")
linear_in_first("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "adjoint", "flip", "fliplr")
linear_in_first("flipud", "roll", "rot90", "expand", "broadcast_to", "repeat", "repeat_interleave", "tile")
linear_in_first("chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind")
linear_in_first("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "as_strided", "unfold", "fold")
linear_in_first("diagonal", "diag", "diag_embed", "diagflat", "tril", "triu", "sum_to_size")
linear_in_first("atleast_1d", "atleast_2d", "atleast_3d")
linear_in_first("clone", "contiguous", "float", "double", "half", "bfloat16", "cuda", "cpu", "pin_memory")
linear_in_first("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
linear_in_first("avg_pool1d", "avg_pool2d", "avg_pool3d", "interpolate", "upsample", "upsample_nearest")
linear_in_first("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_bilinear")
linear_in_first("max_unpool1d", "max_unpool2d", "max_unpool3d", "affine_grid", "grid_sample")
linear_in_first("real", "imag", "view_as_real", "view_as_complex", "conj", "resolve_conj", "resolve_neg", "cdouble")
linear_in_first("cfloat", "fftshift", "ifftshift")
linear_in_first(
    "alias_copy", "as_strided_copy", "diagonal_copy", "expand_copy", "narrow_copy", "permute_copy", "t_copy"
)
linear_in_first("squeeze_copy", "unsqueeze_copy", "transpose_copy", "view_copy", "unfold_copy", "unbind_copy")
linear_in_first("split_with_sizes_copy")
linear_by_example("view_as", "reshape_as", "expand_as", "type_as", "to", "type")

no_tangent(
    *spellings("size", "dim", "numel", "nelement", "stride", "element_size", "is_contiguous", "storage_offset"),
    *spellings("is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg", "is_inference", "is_pinned"),
    *spellings("is_tensor", "_nested_tensor_from_mask_left_aligned"),  # which nn.TransformerEncoder asks in eval
    *spellings("get_device", "data_ptr", "result_type", "is_same_size", "ndimension", "dim_order", "untyped_storage"),
    *spellings("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"),
    *spellings("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "new_empty_strided"),
    *spellings("detach", "int", "long", "bool", "byte", "short", "char"),
)


@register_rule(Tensor.__reversed__)
def reversed_(self: Value) -> Any:
    return self.flip(0)


_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


@rule("view")
def view(input: Value, *shape: Any, **kwargs: Any) -> tuple[Any, Any]:
    dtype = shape[0] if shape else kwargs.get("dtype")
    if isinstance(dtype, torch.dtype) and _REAL.get(dtype, dtype) != _REAL.get(input.dtype, input.dtype):
        raise missing_rule_error(Tensor.view, f"it would read the memory as {dtype}, whose numbers are others")
    y = input.primal.view(*shape, **kwargs)
    with tangent_scope(input):
        return y, input.tangent.view(*shape, **kwargs)


@rule("unflatten")
def unflatten(input: Value, dim: int, sizes: Sequence[int]) -> tuple[Any, Any]:
    # Dynamo traces the method on a tensor, but not the function Tensor.unflatten.
    y = torch.unflatten(input.primal, dim, sizes)
    with tangent_scope(input):
        return y, torch.unflatten(input.tangent, dim, sizes)


@rule("pad")
def pad(input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> tuple[Any, Any]:
    y = F.pad(input.primal, pad, mode, value)
    with tangent_scope(input):
        return y, F.pad(input.tangent, pad, mode)


@rule("broadcast_tensors")
def broadcast_tensors(*tensors: Any) -> tuple[Any, Any]:
    return torch.broadcast_tensors(*map(primal, tensors)), tuple(map(tangent, tensors))


@rule("meshgrid")
@register_rule(torch._C._VariableFunctions.meshgrid)  # type: ignore[attr-defined]  # behind torch.meshgrid of a list
def meshgrid(*tensors: Any, indexing: str = "ij") -> tuple[Any, Any]:
    tensors = tuple(tensors[0]) if type(tensors[0]) in (list, tuple) else tensors
    ys = torch.meshgrid(*map(primal, tensors), indexing=indexing)
    with tangent_scope(*tensors):
        dys = torch.meshgrid(*map(tangent_or_zeros, tensors), indexing=indexing)
        return ys, tuple(None if tangent(x) is None else dy for x, dy in zip(tensors, dys, strict=True))


def tangent_or_zeros(x: Value) -> Tensor:
    """The tangent of x, where an operation cannot do without."""
    dx = tangent(x)
    return torch.zeros_like(primal(x)) if dx is None else dx
