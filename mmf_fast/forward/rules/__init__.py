"""The derivative rules of forward mode, one file per family of operations. Importing the package registers them."""

from mmf_fast.forward.rules import (
    activations,
    arithmetic,
    by_pytorch,
    elementwise,
    indexing,
    linear,
    norms,
    products,
    reductions,
    sdpa,
    shapes,
)

__all__ = [
    "activations",
    "arithmetic",
    "by_pytorch",
    "elementwise",
    "indexing",
    "linear",
    "norms",
    "products",
    "reductions",
    "sdpa",
    "shapes",
]
