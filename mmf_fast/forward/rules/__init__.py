"""The derivative rules of forward mode, one file per family of operations. Importing the package registers them."""

from mmf_fast.forward.rules import (
    activations,
    arithmetic,
    elementwise,
    indexing,
    linear,
    norms,
    pooling,
    products,
    reductions,
    sdpa,
    shapes,
)

__all__ = [
    "activations",
    "arithmetic",
    "elementwise",
    "indexing",
    "linear",
    "norms",
    "pooling",
    "products",
    "reductions",
    "sdpa",
    "shapes",
]
