"""Pooling and resampling."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from mmf_fast.forward.dual import register_rule, tangent_scope
from mmf_fast.forward.rules.families import linear_in_first, rule

linear_in_first("avg_pool1d", "avg_pool2d", "avg_pool3d")
linear_in_first("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
linear_in_first("max_unpool1d", "max_unpool2d", "max_unpool3d")
linear_in_first("interpolate")


def _max_pool(name: str, dims: int) -> None:
    with_indices = getattr(F, f"{name}_with_indices")

    def max_pool(input: Any, *args: Any, return_indices: bool = False, **kwargs: Any) -> tuple[Any, Any]:
        (y, indices), (dy, _) = max_pool_with_indices(input, *args, **kwargs)
        return ((y, indices), (dy, None)) if return_indices else (y, dy)

    def max_pool_with_indices(input: Any, *args: Any, return_indices: bool = True, **kwargs: Any) -> tuple[Any, Any]:
        y, indices = with_indices(input.primal, *args, **kwargs)
        with tangent_scope(input):
            dy = input.tangent.flatten(-dims).gather(-1, indices.flatten(-dims)).view_as(y)
        return (y, indices), (dy, None)

    # torch.adaptive_max_pool1d returns the indices too, torch.max_pool1d does not.
    values, both = [getattr(F, name)], [with_indices]
    if hasattr(torch, name):
        (both if name.startswith("adaptive") else values).append(getattr(torch, name))
    both += [f for f in [getattr(torch, f"{name}_with_indices", None)] if f is not None]
    register_rule(*values)(max_pool)
    register_rule(*both)(max_pool_with_indices)


for _dims in (1, 2, 3):
    _max_pool(f"max_pool{_dims}d", _dims)
    _max_pool(f"adaptive_max_pool{_dims}d", _dims)


def _lp_pool(dims: int) -> None:
    avg_pool, max_pool = getattr(F, f"avg_pool{dims}d"), getattr(F, f"max_pool{dims}d")

    @rule(f"lp_pool{dims}d")
    def lp_pool(
        input: Any, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
    ) -> tuple[Any, Any]:
        """(sum over the window of x^p)^(1/p)."""
        if abs(norm_type) == math.inf:
            size = math.copysign(1, norm_type) * input.abs()
            return math.copysign(1, norm_type) * max_pool(size, kernel_size, stride, ceil_mode=ceil_mode)
        window = kernel_size**dims if isinstance(kernel_size, int) else math.prod(kernel_size)
        mean = avg_pool(input**norm_type, kernel_size, stride, ceil_mode=ceil_mode)
        return (mean * window) ** (1 / norm_type)


for _dims in (1, 2, 3):
    _lp_pool(_dims)


@rule("local_response_norm")
def local_response_norm(input: Any, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Any:
    """x / (k + alpha * mean over neighbouring channels of x^2)^beta."""
    squares = F.pad((input * input).flatten(2).unsqueeze(1), (0, 0, size // 2, (size - 1) // 2))
    mean = F.avg_pool2d(squares, (size, 1), stride=1).squeeze(1).view(input.shape)
    return input / (k + alpha * mean) ** beta
