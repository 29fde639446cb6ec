"""Conditions of a network as users have them: nested dicts, lists and tuples of tensors, arrays, prompts and numbers.

A leaf of B rows has one for each sample and follows it; everything else is shared by all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Paths", "per_sample", "take", "to_device"]

Paths: TypeAlias = tuple[tuple[Any, ...], ...]  # where leaves lie: the keys and indices that lead there


def per_sample(cond: Any, batch: int, shared: Collection[str] = ()) -> Paths:
    """Where the leaves lie that have one row for each of `batch` samples: tensors and arrays of that length, and lists
    or tuples of that length that hold no such leaf (of prompts, for instance).

    shared: names of what belongs to all samples, whatever its length, at any depth.
    """
    if _is_array(cond):
        return ((),) if cond.ndim and len(cond) == batch else ()
    found = tuple(
        (key, *path)
        for key, value in _children(cond)
        if not (isinstance(key, str) and key in shared)
        for path in per_sample(value, batch, shared)
    )
    if not found and isinstance(cond, (list, tuple)) and len(cond) == batch:
        return ((),)
    return found


def take(cond: Any, rows: slice | Tensor, paths: Paths) -> Any:
    """The conditions of these rows: the leaves at `paths` are cut, the others are as they were."""
    if not paths:
        return cond
    if paths == ((),):
        if isinstance(cond, Tensor) or isinstance(rows, slice):
            return cond[rows]
        if _is_array(cond):
            return cond[rows.cpu().numpy()]
        return _like(cond, [cond[i] for i in rows.tolist()])
    cut = {}
    for key in dict.fromkeys(path[0] for path in paths):
        cut[key] = take(cond[key], rows, tuple(path[1:] for path in paths if path[0] == key))
    return _replaced(cond, cut)


def to_device(cond: Any, device: torch.device | str) -> Any:
    """With every tensor on the device; a copy from pinned memory does not wait."""
    return _mapped(cond, lambda x: x.to(device, non_blocking=True))


def _mapped(cond: Any, move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(cond, Tensor):
        return move(cond)
    return _replaced(cond, {key: _mapped(value, move) for key, value in _children(cond)})


def _is_array(cond: Any) -> bool:
    """A tensor, or an array of numpy, which need not be here."""
    return isinstance(cond, Tensor) or (hasattr(cond, "ndim") and type(cond).__module__.startswith("numpy"))


def _children(cond: Any) -> list[tuple[Any, Any]]:
    if isinstance(cond, Mapping):
        return list(cond.items())
    return list(enumerate(cond)) if isinstance(cond, (list, tuple)) else []


def _replaced(cond: Any, by: dict[Any, Any]) -> Any:
    """A container of the same type with some of its items replaced."""
    if not by:
        return cond
    if isinstance(cond, (list, tuple)):
        return _like(cond, [by.get(i, x) for i, x in enumerate(cond)])
    if type(cond) is dict:
        return {**cond, **by}
    result = copy.copy(cond)  # a mapping of a class of its own, as tokenizers give
    for key, value in by.items():
        result[key] = value
    return result


def _like(cond: Any, items: list[Any]) -> Any:
    return type(cond)._make(items) if hasattr(cond, "_make") else type(cond)(items)
