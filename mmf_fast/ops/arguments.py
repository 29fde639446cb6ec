"""What an operator asks of its arguments, whoever calls it; csrc/arguments.h is the same for the C++ kernels.

A kernel finds elements by arithmetic of its own, so a tensor of another shape, dtype, device or layout would be read
and written outside. What is asked here is what the launchers and kernels take for granted, no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Arguments"]


class Arguments:
    """The arguments of one call, beside x, whose dtype and device the others share. Every method raises ValueError."""

    def __init__(self, operator: str, x: Tensor, dimensions: int | None = None) -> None:
        self.operator, self.x = operator, x
        self.holds(x.is_floating_point(), f"its first tensor is {x.dtype}, it must be floating-point")
        if dimensions is not None:
            self.holds(x.ndim == dimensions, f"its first tensor {tuple(x.shape)} must have {dimensions} dimensions")

    def tensors(
        self, shape: Sequence[int], dtype: torch.dtype | None = None, contiguous: bool = False, **named: Tensor | None
    ) -> None:
        """Of this shape and of x's dtype, or another. An absent one passes."""
        x, dtype = self.x, dtype or self.x.dtype
        for name, t in named.items():
            if t is None:
                continue
            # The sentences are made for errors alone: a kernel is launched in less time.
            if t.dtype != dtype or t.shape != shape or t.device != x.device or t.layout != torch.strided:
                expected = f"{name} must be {dtype} {tuple(shape)} on {x.device}"
                self.holds(False, f"{expected}, is {t.dtype} {tuple(t.shape)} on {t.device}")
            if contiguous and not t.is_contiguous():
                self.holds(False, f"{name} must be contiguous, its strides are {t.stride()}")

    def like(self, **named: Tensor | None) -> None:
        """Of the dtype, shape and place in memory of x, which has no gaps there."""
        x = self.x
        whole = x.is_contiguous() or torch.empty_like(x, device="meta").stride() == x.stride()
        self.holds(whole, "x must have no gaps in memory")
        for name, t in named.items():
            self.tensors(x.shape, None, False, **{name: t})
            alike = t is None or t.stride() == x.stride() or same_strides(t, x)
            self.holds(alike, f"{name} must have the strides of its primal")

    def holds(self, condition: bool, rule: str) -> None:
        if not condition:
            raise ValueError(f"{self.operator}: {rule}")


def same_strides(t: Tensor, x: Tensor) -> bool:
    """Whether the strides of two tensors of one shape differ in dimensions of size 1 alone."""
    return all(a == b for a, b, n in zip(t.stride(), x.stride(), x.shape, strict=True) if n > 1)
