"""Triton, where it is installed. Kernels are written against these names, so that importing them never needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, CPU-only wheels of torch
    triton = tl = None

__all__ = ["available", "constexpr_function", "jit", "processors", "tl", "triton"]


def available() -> bool:
    return triton is not None


def jit(kernel: Callable[..., Any]) -> Any:
    """triton.jit, or the plain function where there is no Triton."""
    return kernel if triton is None else triton.jit(kernel)


def constexpr_function(function: Callable[..., Any]) -> Any:
    """triton.constexpr_function, for plain functions of a kernel's constants; the function where there is no Triton."""
    return function if triton is None else triton.constexpr_function(function)


def processors(device: Any) -> int:
    """Multiprocessors of a device; a small number for the interpreter, which runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
