"""Linear layers, convolutions, embeddings, dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmf_fast.forward.dual import Value, primal, register_rule, tangent, tangent_scope
from mmf_fast.forward.missing import missing_rule_error
from mmf_fast.forward.rules.families import add_tangents


def _affine(function: Callable[..., Tensor], spatial_dims: int) -> None:
    """y = f(x, W) + b with f bilinear: dy = f(dx, W) + f(x, dW) + db."""

    @register_rule(function)
    def affine(input: Value, weight: Value, bias: Value = None, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        x, w = primal(input), primal(weight)
        y = function(x, w, primal(bias), *args, **kwargs)
        with tangent_scope(input, weight, bias):
            dx, dw, db = tangent(input), tangent(weight), tangent(bias)
            terms = (
                None if dx is None else function(dx, w, None, *args, **kwargs),
                None if dw is None else function(x, dw, None, *args, **kwargs),
                None if db is None else db.clone().view(-1, *[1] * spatial_dims),
            )
            return y, add_tangents(*terms)


_affine(F.linear, 0)
for _dims, _functions in enumerate(((F.conv1d, F.conv_transpose1d), (F.conv2d, F.conv_transpose2d)), start=1):
    for _function in _functions:
        _affine(_function, _dims)
_affine(F.conv3d, 3)
_affine(F.conv_transpose3d, 3)


@register_rule(F.embedding)
def embedding(
    input: Tensor,
    weight: Value,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, Any]:
    if max_norm is not None:
        raise missing_rule_error(F.embedding, "max_norm rewrites the table in place, normalise it outside the network")
    y = F.embedding(input, weight.primal, padding_idx, None, *args, **kwargs)
    with tangent_scope(weight):
        return y, F.embedding(input, weight.tangent, padding_idx, None, *args, **kwargs)


def _dropout(function: Any) -> None:
    # One mask for primal and tangent: the function applied to ones.
    @register_rule(function)
    def dropout(input: Value, p: float = 0.5, training: bool = True, train: bool = True) -> tuple[Any, Any]:
        if not (training and train) or p == 0:
            return input
        mask = function(torch.ones_like(input.primal), p, True)
        with tangent_scope(input):
            dy = input.tangent * mask
        return input.primal * mask, dy


for _random in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout):
    _dropout(_random)
