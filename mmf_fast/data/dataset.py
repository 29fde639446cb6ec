"""What a dataset is, and the one kind of it that holds its samples in memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["ArrayDataset", "Batch", "Dataset", "Split", "check_batch", "check_seed", "check_split"]

Split: TypeAlias = Literal["train", "validation"]
Batch: TypeAlias = tuple[Tensor, Tensor | None]


class Dataset(Protocol):
    """A training stream without state, and two fixed splits.

    name: what `load` knows it by.  shape: of one sample: (dim,) or (C, H, W).
    num_classes: 0 where samples have no labels; otherwise labels are 0 .. num_classes - 1.
    """

    name: str
    shape: tuple[int, ...]
    num_classes: int

    def batch(self, step: int, size: int) -> Batch:
        """x (size, *shape) float32 and y (size,) int64 or None: a pure function of (seed, step, size).

        Whoever resumes at a step sees the batches an uninterrupted run would have seen; data-parallel ranks each take
        their rows of the same batch. Raises ValueError for a negative step or a size that does not fit.
        """
        ...

    def split(self, name: Split) -> Batch:
        """All of a split, the same at every call: x (N, *shape) float32, y (N,) int64 or None."""
        ...


class ArrayDataset:
    """A dataset in memory. One epoch visits every training sample once, in the order of a seeded permutation.

    splits: {"train": (x, y), "validation": (x, y)} with x (N, *shape) float32 and y (N,) int64 or None.
    The training stream is the concatenation of all epochs, cut into batches; a batch may span two epochs.
    Raises ValueError for a negative seed.
    """

    def __init__(self, name: str, splits: Mapping[Split, Batch], num_classes: int = 0, seed: int = 0) -> None:
        check_seed(seed)
        x, _ = splits["train"]
        self.name, self.shape, self.num_classes, self.seed = name, tuple(x.shape[1:]), num_classes, seed
        self._splits = dict(splits)
        self._permutation = lru_cache(maxsize=2)(self._permute)  # a batch meets at most two epochs

    def batch(self, step: int, size: int) -> Batch:
        x, y = self._splits["train"]
        check_batch(step, size)
        if size > len(x):
            raise ValueError(
                f"batch size {size} exceeds the {len(x)} training samples of {self.name}; use at most {len(x)}"
            )
        first, last = step * size, (step + 1) * size - 1
        epochs = range(first // len(x), last // len(x) + 1)
        order = np.concatenate([self._permutation(epoch) for epoch in epochs])
        start = first - epochs[0] * len(x)
        rows = torch.from_numpy(order[start : start + size])
        return x[rows], None if y is None else y[rows]

    def split(self, name: Split) -> Batch:
        check_split(name)
        return self._splits[name]

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self._splits["train"][0]))


def check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"data seed is {seed}: it must not be negative")


def check_batch(step: int, size: int) -> None:
    if step < 0:
        raise ValueError(f"step is {step}: it must not be negative")
    if size < 1:
        raise ValueError(f"batch size is {size}: it must be at least 1")


def check_split(name: str) -> None:
    if name not in ("train", "validation"):
        raise ValueError(f"unknown split {name!r}; valid are train, validation")
