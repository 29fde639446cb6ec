"""Cases for the table of rules: a call of a torch function, with its floating-point tensors as the variables."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmf_fast.forward.dual import Dual, primal, tangent

_generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator, dtype=torch.float64)


def uniform(*shape: int, low: float = 0.1, high: float = 0.9) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=_generator, dtype=torch.float64)


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=_generator)


@dataclass
class Fixed:
    """A floating-point tensor that is no variable; every call gets its own copy, so that it may be written to."""

    value: Tensor


@dataclass
class Case:
    label: str
    functions: list[Any]  # spellings of one operation, called alike
    args: tuple
    kwargs: dict

    def __post_init__(self) -> None:
        self._leaves, self._spec = tree_flatten((self.args, self.kwargs))
        self._moving = [i for i, leaf in enumerate(self._leaves) if _is_variable(leaf)]

    @property
    def variables(self) -> list[Tensor]:
        return [self._leaves[i].clone() for i in self._moving]

    def directions(self, salt: int = 0) -> list[Tensor]:
        g = torch.Generator().manual_seed(1 + salt)
        return [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in self.variables]

    def arguments(self, variables: list[Any]) -> tuple[tuple, dict]:
        leaves = [leaf.value.clone() if isinstance(leaf, Fixed) else leaf for leaf in self._leaves]
        for i, x in zip(self._moving, variables, strict=True):
            leaves[i] = x
        return tree_unflatten(leaves, self._spec)

    def call(self, variables: list[Any], function: Any = None) -> list[Any]:
        """The floating-point results, flat, of one spelling (the first); random functions draw alike in each call."""
        args, kwargs = self.arguments(variables)
        torch.default_generator.manual_seed(0)  # torch.manual_seed formats a traceback for each kind of accelerator
        return floats(apply(self.functions[0] if function is None else function, args, kwargs))

    def subsets(self) -> Iterator[tuple[bool, ...]]:
        """Which variables carry a tangent: each alone, all but each, all."""
        n = len(self._moving)
        alone = {tuple(i == j for j in range(n)) for i in range(n)}
        but_one = {tuple(i != j for j in range(n)) for i in range(n)}
        yield from sorted(s for s in alone | but_one | {(True,) * n} if any(s))


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.float64


def apply(function: Any, args: tuple, kwargs: dict) -> Any:
    if is_method(function):  # a method of Tensor is looked up on the first argument, as Python does
        return getattr(args[0], function.__name__)(*args[1:], **kwargs)
    return function(*args, **kwargs)


def is_method(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return getattr(Tensor, name, None) is function and function is not getattr(torch, name, None)


def floats(result: Any) -> list[Any]:
    leaves = tree_flatten(result, is_leaf=lambda x: isinstance(x, Dual))[0]
    return [y for y in leaves if isinstance(primal(y), Tensor) and primal(y).is_floating_point()]


def tangents(results: list[Any]) -> list[Tensor]:
    return [torch.zeros_like(primal(y)) if tangent(y) is None else tangent(y) for y in results]


def spellings(name: str) -> list[Any]:
    spaces = (torch, Tensor, F, torch.special, torch.linalg)
    return list(dict.fromkeys(getattr(space, name) for space in spaces if callable(getattr(space, name, None))))


class Table:
    """Collects cases; labels are the names with a running number."""

    def __init__(self) -> None:
        self.cases: list[Case] = []
        self._numbers: dict[str, itertools.count] = {}

    def __call__(self, name: str | Callable[..., Any], *args: Any, label: str = "", **kwargs: Any) -> None:
        functions = spellings(name) if isinstance(name, str) else [name]
        if not functions:
            return  # this PyTorch has no such function
        functions = [f for f in functions if _accepts(f, args, kwargs)]
        if not functions:
            raise ValueError(f"no spelling of {name} takes these arguments: correct the table")
        stem = label or (name if isinstance(name, str) else getattr(name, "__name__", str(name)))
        number = next(self._numbers.setdefault(stem, itertools.count()))
        self.cases.append(Case(f"{stem}-{number}", functions, args, kwargs))

    def each(self, names: str, *args: Any, **kwargs: Any) -> None:
        for name in names.split():
            self(name, *args, **kwargs)


def _accepts(function: Any, args: tuple, kwargs: dict) -> bool:
    # Spellings may differ in their arguments (a method has none by the name of input): keep those that take these.
    try:
        Case("", [function], args, kwargs).call(Case("", [function], args, kwargs).variables)
    except (TypeError, AttributeError):
        return False
    return True
