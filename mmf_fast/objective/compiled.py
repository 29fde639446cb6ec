"""A function of a step, compiled for batches of any size."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Compiled"]

OWN_SHAPES = 2  # whose graphs have numbers for sizes: those of a full batch and of a last one
GRAPHS = 64  # lambda zero or positive, two counts of intervals, five of those with a graph, for several losses


class Compiled:
    """function(*args) by torch.compile (fullgraph). The first two shapes of data have graphs of their own; all others,
    such as buckets, share graphs whose sizes are symbols. Where such a graph cannot be had, or there are too many, the
    function runs as it is, after one warning. A copy compiles anew.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.function, self.options = function, options
        self.shapes: set[torch.Size] = set()
        self.fixed = torch.compile(function, fullgraph=True, dynamic=False, **options)
        self.free = torch.compile(function, fullgraph=True, dynamic=None, **options)  # True: numbers are symbols too

    def __reduce__(self) -> tuple[Any, ...]:
        return Compiled, (self.function, self.options)

    def __call__(self, data: Tensor, *args: Any) -> Any:
        """function(*args); data: whose shape decides."""
        from torch._dynamo.exc import FailOnRecompileLimitHit  # takes longer than importing torch, often for nothing

        own = data.shape in self.shapes or len(self.shapes) < OWN_SHAPES
        if own:
            self.shapes.add(data.shape)
        expected = FailOnRecompileLimitHit if own else Exception  # a compiler can raise anything here
        try:
            with torch._dynamo.config.patch(recompile_limit=GRAPHS):
                return (self.fixed if own else self.free)(*args)
        except expected as error:
            reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"batches of shape {tuple(data.shape)} and of new ones run without torch.compile: {reason}", stacklevel=4
        )
        self.free = self.function
        self.fixed = self.function if own else self.fixed
        return self.function(*args)
