"""Linear layers, convolutions, embeddings, dropout, pooling, interpolation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmf_fast.dual import missing_rule, primal, register_rule, tangent, tangent_scope
from mmf_fast.rules.common import add_tangents, linear_in_first, rule


def _affine(function: Callable[..., Tensor], bias_shape: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """y = f(x, W) + b with f bilinear: dy = f(dx, W) + f(x, dW) + db."""

    def affine(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        x, w = primal(input), primal(weight)
        y = function(x, w, primal(bias), *args, **kwargs)
        with tangent_scope(input, weight, bias):
            dx, dw, db = tangent(input), tangent(weight), tangent(bias)
            terms = (
                None if dx is None else function(dx, w, None, *args, **kwargs),
                None if dw is None else function(x, dw, None, *args, **kwargs),
                None if db is None else bias_shape(db, y).expand_as(y),
            )
            return y, add_tangents(*terms)

    return affine


def _channels(bias: Tensor, y: Tensor) -> Tensor:
    return bias.reshape(-1, *[1] * (y.ndim - (1 if y.ndim == bias.ndim else 2)))


register_rule(F.linear)(_affine(F.linear, lambda bias, y: bias))
for _function in (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    register_rule(_function)(_affine(_function, _channels))


@rule("bilinear")
def bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    y = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return y if bias is None else y + bias


@register_rule(F.embedding)
def embedding(input: Tensor, weight: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    y = F.embedding(input, weight.primal, *args, **kwargs)
    with tangent_scope(weight):
        return y, F.embedding(input, weight.tangent, *args, **kwargs)


# -- dropout: one mask for primal and tangent --------------------------------------------------------------------------


def _dropout(name: str, mask_dims: int | None) -> None:
    # mask_dims: how many leading dimensions the mask has; the others share it (dropout2d drops whole channels).
    function = getattr(F, name)

    @register_rule(function, *filter(None, [getattr(torch, name, None)]))
    def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> tuple[Any, Any]:
        if inplace:
            raise missing_rule(function, "a Dual is immutable, build the module with inplace=False")
        if not training or p == 0:
            return input
        x = input.primal
        leading = x.ndim if mask_dims is None else min(mask_dims, x.ndim)
        mask = torch.ones(x.shape[:leading] + (1,) * (x.ndim - leading), dtype=x.dtype, device=x.device)
        mask = F.dropout(mask, p)
        with tangent_scope(input):
            dy = input.tangent * mask
        return x * mask, dy


_dropout("dropout", None)
for _name in ("dropout1d", "dropout2d", "dropout3d", "feature_dropout"):
    if hasattr(F, _name):
        _dropout(_name, 2)


# -- pooling and resampling --------------------------------------------------------------------------------------------

linear_in_first("avg_pool1d", "avg_pool2d", "avg_pool3d")
linear_in_first("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
linear_in_first("interpolate", "upsample", "upsample_nearest", "upsample_bilinear")


def _max_pool(functions: list[Any], with_indices: Callable[..., tuple[Tensor, Tensor]], dims: int) -> None:
    @register_rule(*functions)
    def max_pool(input: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return_indices = kwargs.pop("return_indices", False)
        y, indices = with_indices(input.primal, *args, **kwargs)
        with tangent_scope(input):
            dy = input.tangent.flatten(-dims).gather(-1, indices.flatten(-dims)).unflatten(-1, indices.shape[-dims:])
        return ((y, indices), (dy, None)) if return_indices else (y, dy)


for _dims in (1, 2, 3):
    for _name in (f"max_pool{_dims}d", f"adaptive_max_pool{_dims}d"):
        _functions = [getattr(F, _name), getattr(torch, _name, None), getattr(F, f"_{_name}", None)]
        _functions += [getattr(F, f"{_name}_with_indices")]
        _max_pool(list(filter(None, _functions)), getattr(F, f"{_name}_with_indices"), _dims)
