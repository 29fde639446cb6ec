"""The derivative rules of forward mode, one file per family of operations. Importing the package registers them."""

from mmf_fast.rules import (
    activations,
    arithmetic,
    attention,
    elementwise,
    indexing,
    layers,
    norms,
    pooling,
    products,
    reductions,
    shapes,
)

__all__ = [
    "activations",
    "arithmetic",
    "attention",
    "elementwise",
    "indexing",
    "layers",
    "norms",
    "pooling",
    "products",
    "reductions",
    "shapes",
]
