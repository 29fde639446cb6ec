"""What the files of a run can hold: numbers and words of Python, tensors, and dicts, lists and tuples of these."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["plain", "readable"]

KNOWN = {bool, int, float, str, type(None), Tensor, nn.Parameter}  # torch.load reads them: there is no need to try


def plain(tree: Any) -> Any:
    """The same with NumPy's numbers, such as np.logspace gives, as Python's."""
    if isinstance(tree, np.generic) or (isinstance(tree, np.ndarray) and tree.ndim == 0):
        return tree.item()
    if isinstance(tree, dict):
        return {plain(key): plain(value) for key, value in tree.items()}
    return type(tree)(map(plain, tree)) if type(tree) in (list, tuple) else tree


def readable(tree: Any, name: str) -> Any:
    """`plain(tree)`. Raises ValueError, with the place in `name`, for what torch.load(weights_only=True) does not read:
    a checkpoint with it would be written, and could never be used."""
    tree = plain(tree)
    for place, value in _leaves(tree, name):
        if type(value) not in KNOWN and not _reads(value):
            raise ValueError(
                f"{place} is of {type(value).__name__}, which no checkpoint can hold: give a number, a word, a tensor, "
                "or a list or dict of these"
            )
    return tree


def _leaves(tree: Any, place: str) -> Iterator[tuple[str, Any]]:
    if type(tree) is dict:
        for key, value in tree.items():
            yield f"a key of {place}", key
            yield from _leaves(value, f"{place}.{key}")
    elif type(tree) in (list, tuple):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{place}[{i}]")
    else:
        yield place, tree


def _reads(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # of all kinds: what cannot be pickled says so in its own way
        return False
    return True
