"""Triton, where it is installed. Kernels are written against these names, so that importing them never needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, CPU-only wheels of torch
    triton = tl = None

__all__ = ["available", "constexpr_function", "jit", "on_device_of_tensors", "processors", "tl", "triton"]


def available() -> bool:
    return triton is not None


def jit(kernel: Callable[..., Any]) -> Any:
    """triton.jit, or the plain function where there is no Triton."""
    return kernel if triton is None else triton.jit(kernel)


def constexpr_function(function: Callable[..., Any]) -> Any:
    """triton.constexpr_function, for plain functions of a kernel's constants; the function where there is no Triton."""
    return function if triton is None else triton.constexpr_function(function)


def on_device_of_tensors(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher, called with the device of its tensors as the current one, to which Triton launches. That is
    another where nobody has set it: PyTorch's own functions go by their tensors, and its backward passes set it."""

    def launch(*args: Any) -> Any:
        device = next(x.device for x in args if isinstance(x, Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(*args)
        with torch.cuda.device(device):
            return launcher(*args)

    return launch


def processors(device: Any) -> int:
    """Multiprocessors of a device; a small number for the interpreter, which runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
