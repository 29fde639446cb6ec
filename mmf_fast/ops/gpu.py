"""Triton, where it is installed. Kernels are written against these names, so that importing them never needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, CPU-only wheels of torch
    triton = tl = None

__all__ = ["available", "jit", "tl", "triton"]


def available() -> bool:
    return triton is not None


def jit(kernel: Callable[..., Any]) -> Any:
    """triton.jit, or the plain function where there is no Triton."""
    return kernel if triton is None else triton.jit(kernel)
