"""What a dataset is, and the one kind of it that holds its samples in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "ArrayDataset",
    "Batch",
    "Conditions",
    "Dataset",
    "Epochs",
    "Identity",
    "Split",
    "SplitName",
    "StoredSplit",
    "check_seed",
    "check_split",
    "coins",
    "conditions_of",
    "rank_part",
    "row_noise",
    "whole",
]

_COIN = 1  # coins have the random key (seed, step, this); permutations have keys of two numbers
_WHOLE_BYTES = 8 * 2**30  # largest split that is handed out in one piece

SplitName: TypeAlias = Literal["train", "validation"]
Identity: TypeAlias = Mapping[str, str | None]
Conditions: TypeAlias = Tensor | Mapping[str, Any] | None  # labels y, or keyword arguments of the network by name
Batch: TypeAlias = tuple[Tensor, Conditions]
Split: TypeAlias = tuple[Tensor, Tensor | None]  # samples and their labels
StoredSplit: TypeAlias = tuple[np.ndarray, Tensor | None]  # samples as they lie in memory or on disk, and labels


def conditions_of(given: Conditions) -> dict[str, Any]:
    """What a batch holds beside x, as keyword arguments of the network: nothing, labels `y`, or by name."""
    if given is None:
        return {}
    return dict(given) if isinstance(given, Mapping) else {"y": given}


class Dataset(Protocol):
    """A training stream without state, and two fixed splits.

    name: what `load` knows it by.  shape: of one sample: (dim,), (T, C) or (C, H, W).
    num_classes: 0 where samples have no labels; otherwise labels are 0 .. num_classes - 1.
    identity: for the options of its function that say where samples lie, or how they are checked: what they come to for
        the training stream (None: nothing). Two datasets of equal identity and other options have equal streams.
    """

    name: str
    shape: tuple[int, ...]
    num_classes: int
    identity: Identity

    def batch(self, step: int, size: int, rank: int = 0, world_size: int = 1) -> Batch:
        """x (size / world_size, *shape) and what the network is given beside it, a row for each sample: nothing, labels
        y (int64), or {name: rows}. A pure function of (seed, step, size) and rank.

        x is float32, or uint8 for images as they are stored: the loss takes both, and makes numbers of bytes on the
        device. size: of the global batch, of which rank 0 gets the first rows, rank 1 the next. Whoever resumes at a
        step, on whatever number of ranks, sees the samples that an uninterrupted run would have seen.
        Raises ValueError for a negative step, or a size that does not fit the data or the ranks.
        """
        ...

    def split(self, name: SplitName) -> Split:
        """All of a split, the same at every call: x (N, *shape) float32, y (N,) int64 or None."""
        ...


class ArrayDataset:
    """A dataset in memory. One epoch visits every training sample once, in the order of a seeded permutation.

    splits: {"train": (x, y), "validation": (x, y)} with x (N, *shape) float32 and y (N,) int64 or None.
    The training stream is the concatenation of all epochs, cut into batches; a batch may span two epochs.
    Raises ValueError for a negative seed.
    """

    def __init__(self, name: str, splits: Mapping[SplitName, Split], num_classes: int = 0, seed: int = 0) -> None:
        x, _ = splits["train"]
        self.identity: Identity = {}
        self.name, self.shape, self.num_classes, self.seed = name, tuple(x.shape[1:]), num_classes, seed
        self._splits = dict(splits)
        self._epochs = Epochs(name, len(x), seed)

    def batch(self, step: int, size: int, rank: int = 0, world_size: int = 1) -> Batch:
        x, y = self._splits["train"]
        rows = self._epochs.rows(step, size, rank, world_size)
        return x[rows], None if y is None else y[rows]

    def split(self, name: SplitName) -> Split:
        check_split(name)
        if name not in self._splits:
            raise ValueError(
                f'{self.name} has no {name} split: give one, ArrayDataset(name, {{"train": (x, y), "{name}": (x, y)}})'
            )
        return self._splits[name]


class Epochs:
    """The training stream of `count` samples: epoch after epoch, each in the order of its own seeded permutation.

    A permutation costs 8 bytes a sample and is made once an epoch (20 ms for ImageNet); two are kept.
    Raises ValueError for a negative seed.
    """

    def __init__(self, name: str, count: int, seed: int) -> None:
        check_seed(seed)
        self.name, self.count, self.seed = name, count, seed
        self._permutation = lru_cache(maxsize=2)(self._permute)  # a batch meets at most two epochs

    def rows(self, step: int, size: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """Indices (size / world_size,) int64 of a rank's samples. Raises ValueError as `Dataset.batch` does."""
        part = rank_part(step, size, rank, world_size)
        if size > self.count:
            raise ValueError(
                f"batch size {size} exceeds the {self.count} training samples of {self.name}; use at most {self.count}"
            )
        first, last = step * size, (step + 1) * size
        pieces = []
        while first < last:
            epoch, start = divmod(first, self.count)
            stop = min(self.count, start + last - first)
            pieces.append(self._permutation(epoch)[start:stop])
            first += stop - start
        return torch.from_numpy(np.concatenate(pieces)[part])

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)


def rank_part(step: int, size: int, rank: int, world_size: int) -> slice:
    """The rows of the global batch that belong to a rank. Raises ValueError where they cannot be told."""
    if step < 0:
        raise ValueError(f"step is {step}: it must not be negative")
    if size < 1:
        raise ValueError(f"batch size is {size}: it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}: it must lie in 0 .. {world_size - 1}")
    if size % world_size:
        fitting = max(world_size, size - size % world_size)
        raise ValueError(f"batch size {size} does not divide among {world_size} ranks; use {fitting}")
    own = size // world_size
    return slice(rank * own, (rank + 1) * own)


def coins(seed: int, step: int, size: int) -> Tensor:
    """Fair coins (size,) bool, one for each row of the global batch, whichever rank it belongs to."""
    return torch.from_numpy(np.random.default_rng([seed, step, _COIN]).random(size) < 0.5)


def row_noise(key: tuple[int, int], rows: range, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal (len(rows), ...) float32, a function of (key, row) alone, whoever draws it.

    Philox turns (key, counter) into random numbers. The counter's last word is the row: each row has its own stream.
    shape: of the result.
    """
    noise = np.empty(shape, np.float32)
    for i, row in enumerate(rows):
        stream = np.random.Philox(key=np.array(key, np.uint64), counter=[0, 0, 0, row])
        np.random.Generator(stream).standard_normal(out=noise[i], dtype=np.float32)
    return noise


def whole(dataset: Dataset, name: SplitName, splits: Mapping[SplitName, StoredSplit | None]) -> StoredSplit:
    """The split as it is stored. Raises ValueError where there is none, or it is too large to be held as float32."""
    check_split(name)
    found = splits[name]
    if found is None:
        raise ValueError(
            f"{dataset.name} has no validation split; prepare one and name its folder with data.validation=FOLDER"
        )
    size = 4 * len(found[0]) * math.prod(dataset.shape)
    if size > _WHOLE_BYTES:
        raise ValueError(
            f"split {name} of {dataset.name} takes {size / 2**30:.0f} GiB of memory as float32; read it by batch()"
        )
    return found


def check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"data seed is {seed}: it must not be negative")


def check_split(name: str) -> None:
    if name not in ("train", "validation"):
        raise ValueError(f"unknown split {name!r}; valid are train, validation")
