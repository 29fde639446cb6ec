"""Data of one's own as a `Dataset`: tensors, a torch Dataset, or anything that yields batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from mmf_fast.data.dataset import ArrayDataset, Batch, Dataset, Epochs, Identity, Split, SplitName, rank_part

__all__ = ["IndexedDataset", "StreamedDataset", "as_dataset"]


def as_dataset(source: Any, seed: int = 0) -> Dataset:
    """A `Dataset` from any of these; x is floating-point, or uint8 for images of 0 to 255, which stand for [-1, 1]:

        x, or (x, cond)     tensors or arrays of all N samples; cond: labels (N,), or {"name": N rows}
        a torch Dataset     dataset[i] is x, (x, y) or (x, {"name": ...}), with a length: shuffled anew in each epoch
                            (a list is one, of samples)
        an iterable         of batches x, (x, y) or (x, {...}), such as a DataLoader: on each process those of its own
        a Dataset           of this package, as it is

    cond are the keyword arguments of the network; labels alone are its `y`. A coupling, or a source other than normal
    noise, gives each sample its own: {"noise": rows like x, ...}. seed: of the order of the samples.
    Labels (N,) of integers from 0 are classes, as many as the largest says; `num_classes` of other data is 0, for only
    their batches tell.
    Raises ValueError for anything else, such as rows of named columns: which of them is x nobody has said.
    """
    lacking = [name for name in _ASKED if not hasattr(source, name)]
    if not lacking:
        return source
    if isinstance(source, _ROWS):
        source = (source, None)
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], _ROWS):
        return _held(*source, seed=seed)
    if isinstance(source, Mapping) and 0 not in source:
        names = _listed(source)
        raise ValueError(f"data is a {type(source).__name__} of {names}: give one of its entries, or (x, y) of two")
    streams = isinstance(source, IterableDataset)  # which inherits __getitem__, and may have a length
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not streams:
        return IndexedDataset(source, seed)
    if isinstance(source, Iterable):
        return StreamedDataset(source, seed)
    if "batch" not in lacking:
        raise ValueError(f"data is a {type(source).__name__} without {', '.join(lacking)}: give it what a Dataset has")
    raise ValueError(
        f"data is a {type(source).__name__}: give a tensor, (x, y), a torch Dataset, or an iterable of batches"
    )


_ROWS = (Tensor, np.ndarray)
# What training asks of a `Dataset`. One of Hugging Face, and a torch DataPipe, have a `batch` that is something else.
_ASKED = ("name", "shape", "num_classes", "identity", "batch")


def _held(x: Any, cond: Any, seed: int) -> Dataset:
    """Tensors or arrays of all samples. Raises ValueError where they have not as many rows, or are something else."""
    if x.ndim < 2 or not len(x):
        lacking = "gave single numbers: a sample is a tensor of at least one dimension" if len(x) else "has no samples"
        raise ValueError(f"{type(x).__name__} {lacking}")
    if cond is not None and not isinstance(cond, (*_ROWS, Mapping)):
        raise ValueError(f"beside x there is a {type(cond).__name__}: give labels as a tensor, or {{name: tensor}}")
    named = cond if isinstance(cond, Mapping) else {} if cond is None else {"y": cond}
    for name, rows in named.items():
        if not isinstance(rows, _ROWS) or len(rows) != len(x):
            found = f"{len(rows)} rows" if isinstance(rows, _ROWS) else f"a {type(rows).__name__}"
            raise ValueError(f"{name} is {found}, x has {len(x)} rows: give a tensor with a row for each sample")
    tensors = {name: torch.as_tensor(rows) for name, rows in named.items()}
    if isinstance(cond, Mapping):
        return IndexedDataset(_Table(torch.as_tensor(x), tensors), seed)
    y = tensors.get("y")
    return ArrayDataset("tensor", {"train": (torch.as_tensor(x), y)}, 0 if y is None else _classes(y), seed)


def _classes(y: Tensor) -> int:
    """How many classes labels speak of: 0 where they are no integers from 0, one for each sample."""
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.min() < 0:
        return 0
    return int(y.max()) + 1


class _Own:
    """Shape and classes of a dataset that only yields batches: they are read from its first batch."""

    num_classes = 0  # unknown: that of the network counts, and pictures take the conditions of the first batch
    identity: Identity = {}

    def __init__(self, source: Any, shape: tuple[int, ...]) -> None:
        self.source, self.shape, self.name = source, shape, type(source).__name__
        if not shape:
            raise ValueError(f"{self.name} gave single numbers: a sample is a tensor of at least one dimension")

    def split(self, name: SplitName) -> Split:
        raise ValueError(f"{self.name} has no splits: evaluate with a dataset that has a training and a validation set")


class _Table:
    """Tensors of N rows as a torch Dataset."""

    def __init__(self, x: Tensor, cond: Mapping[str, Tensor]) -> None:
        self.x, self.cond = x, cond

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x[row], {name: value[row] for name, value in self.cond.items()}


class IndexedDataset(_Own):
    """A torch Dataset with a length: samples by index, collated as a DataLoader does it.

    A batch is a function of (seed, step, size) alone where source[i] is one of i alone.
    """

    def __init__(self, source: Any, seed: int = 0) -> None:
        if not len(source):
            raise ValueError(f"{type(source).__name__} has no samples")
        super().__init__(source, tuple(_split(_collated([source[0]]))[0].shape[1:]))
        self._epochs = Epochs(self.name, len(source), seed)

    def batch(self, step: int, size: int, rank: int = 0, world_size: int = 1) -> Batch:
        rows = self._epochs.rows(step, size, rank, world_size).tolist()
        return _split(_collated([self.source[row] for row in rows]))


def _collated(samples: list[Any]) -> Any:
    """As a DataLoader does it. Raises ValueError for samples that are no tensors, arrays or numbers."""
    if isinstance(samples[0], Mapping):
        raise _no_sample(samples[0])
    try:
        return default_collate(samples)
    except TypeError as error:
        held = samples[0] if isinstance(samples[0], (tuple, list)) else [samples[0]]
        kinds = ", ".join(type(each).__name__ for each in held)
        raise ValueError(
            f"a sample holds {kinds}, which makes no batch ({str(error).split(';')[0]}): give tensors, arrays or "
            "numbers, of an image by torchvision's PILToTensor"
        ) from error


class StreamedDataset(_Own):
    """An iterable of batches, gone through again when it ends. A run goes on exactly where going through it again gives
    the same batches; those before are left out. So `set_epoch(epoch)` is called where it or one of its samplers has
    one, and a DataLoader without a generator gets one, seeded by (seed, epoch, rank), and draws no more from the global
    one.

    Each process gives its own iterable, of batches of train.batch / processes samples.
    """

    def __init__(self, source: Iterable[Any], seed: int = 0) -> None:
        self.source, self.name = source, type(source).__name__
        self._seed, self._generator = seed, torch.Generator()
        self._epoch, self._next = 0, 0  # _next: the step whose batch comes next
        self._batches: Iterator[Any] = iter(())
        self._last: tuple[int, Batch] | None = None
        self._restart()
        super().__init__(source, tuple(self._take(0)[0].shape[1:]))

    def batch(self, step: int, size: int, rank: int = 0, world_size: int = 1) -> Batch:
        rank_part(step, size, rank, world_size)  # refuses what does not divide
        found = self._take(step)
        if len(found[0]) * world_size != size:
            raise ValueError(
                f"{self.name} gave a batch of {len(found[0])} at step {step}, but {size} samples on {world_size} "
                f"processes are {size // world_size} each: set train.batch, or the batch size of the data (drop_last)"
            )
        return found

    def _take(self, step: int) -> Batch:
        if self._last is not None and self._last[0] == step:
            return self._last[1]
        if step < self._next:
            self._restart()
        while True:
            batch = self._advance()
            if self._next > step:
                self._last = (step, _split(batch))
                return self._last[1]

    def _advance(self) -> Any:
        for _ in range(2):
            for batch in self._batches:
                self._next += 1
                return batch
            self._begin(self._epoch + 1)
        raise ValueError(
            f"{self.name} ended after {self._next} batches and gives none when it is gone through again: "
            "give an iterable that can be, such as a DataLoader, or fewer train.steps"
        )

    def _restart(self) -> None:
        if self._next and isinstance(self.source, Iterator):
            raise ValueError(f"{self.name} cannot be gone through again: give an iterable, such as a DataLoader")
        self._next = 0
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        key = (self._seed, epoch, int(os.environ.get("RANK", 0)))  # as launchers set it: no group has been joined yet
        self._generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        batches = getattr(self.source, "batch_sampler", None)
        each: Any
        for each in (self.source, getattr(self.source, "sampler", None), batches, getattr(batches, "sampler", None)):
            getattr(each, "set_epoch", lambda epoch: None)(epoch)
            if getattr(each, "generator", self) is None:
                each.generator = self._generator
        self._batches = iter(self.source)


def _split(item: Any) -> Batch:
    """x, (x,), (x, y) or (x, {...}) -> (x, condition)"""
    if isinstance(item, Tensor):
        return item, None
    if isinstance(item, (tuple, list)) and 1 <= len(item) <= 2 and isinstance(item[0], Tensor):
        return item[0], item[1] if len(item) == 2 else None
    raise _no_sample(item)


def _no_sample(item: Any) -> ValueError:
    found, way_out = f"a {type(item).__name__}", ""
    if isinstance(item, Mapping):  # a row of Hugging Face: which column is x, and how it becomes a tensor, is not said
        columns = ", ".join(f"row[{name!r}]" for name in [*item][:2])
        found += f" of {_listed(item)}"
        way_out = f"; wrap the data in a torch Dataset whose __getitem__ returns {columns} (a DataLoader: collate_fn)"
    return ValueError(f"data gave {found}: a sample is x, (x, y) or (x, {{name: value}}), x a tensor{way_out}")


def _listed(names: Iterable[Any]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")
