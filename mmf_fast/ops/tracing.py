"""What torch.compile is told without importing Dynamo: that takes longer than importing torch, often for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["constant_to_dynamo"]

_Function = TypeVar("_Function", bound=Callable)


def constant_to_dynamo(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result: while tracing, the function is called and its result is a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # all that the decorator does
    return function
