"""The derivative rules of forward mode, one file per family of operations. Importing the package registers them."""

from mmf_fast.forward.rules import (
    activations,
    arithmetic,
    by_pytorch,
    elementwise,
    in_place,
    indexing,
    linear,
    linear_algebra,
    norms,
    products,
    recurrent,
    reductions,
    sdpa,
    shapes,
)

__all__ = [
    "activations",
    "arithmetic",
    "by_pytorch",
    "elementwise",
    "in_place",
    "indexing",
    "linear",
    "linear_algebra",
    "norms",
    "products",
    "recurrent",
    "reductions",
    "sdpa",
    "shapes",
]

in_place.register()  # last: an in-place method is the rule of the function, written into its argument
