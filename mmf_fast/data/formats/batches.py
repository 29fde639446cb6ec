"""CIFAR and downsampled ImageNet (Chrabaszcz, 2017): a few files, each a table with one planar RGB image per row.

    CIFAR-10       cifar-10-python.tar.gz or cifar-10-batches-py/: data_batch_{1..5}, test_batch
                   pickle: data uint8 [n, 3072], labels list of 0 .. 9
    CIFAR-100      cifar-100-python.tar.gz or cifar-100-python/: train, test, meta
                   pickle: data uint8 [n, 3072], fine_labels list of 0 .. 99, coarse_labels list of 0 .. 19
    ImageNet-64    train_data_batch_{1..10}, val_data, each a pickle or an .npz
                   data uint8 [n, 12288], labels 1 .. 1000 in the authors' own class order; `mean` is not needed

ImageNet's labels become 0 .. 999; their order is not that of the sorted WordNet ids. A pickle is read whole, one at a
time (1.6 GB of ImageNet-64); an npz is streamed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from mmf_fast.data.formats.arrays import array_file, read_array, rows
from mmf_fast.data.formats.pickles import load_dict
from mmf_fast.data.formats.sources import DataError, Item, Options, Source
from mmf_fast.data.formats.trees import Tree

__all__ = ["CIFAR10_CLASSES", "open_cifar10", "open_cifar100", "open_imagenet"]

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

_CIFAR10 = {"train": [f"data_batch_{i}" for i in range(1, 6)], "validation": ["test_batch"]}
_CIFAR100 = {"train": ["train"], "validation": ["test"]}
_IMAGENET = {"train": [f"train_data_batch_{i}" for i in range(1, 11)], "validation": ["val_data"]}


# ---- CIFAR -----------------------------------------------------------------------------------------------------------


def open_cifar10(tree: Tree, options: Options) -> Source:
    """The tar.gz, or the folder it unpacks to, wherever in the tree. Raises DataError."""
    names = _all_present(tree, _CIFAR10[options.split])
    items = partial(_items, tree, names, 0, 10, 32)
    return _source("cifar10", tree, names, items, num_classes=10, classes=CIFAR10_CLASSES)


def open_cifar100(tree: Tree, options: Options) -> Source:
    """By its fine labels, or by the 20 coarse ones where label_column is "coarse_labels". Raises DataError."""
    key = options.label_column or "fine_labels"
    if key not in ("fine_labels", "coarse_labels"):
        raise DataError(f"{tree.path}: has no labels {key!r}; pass --label-column fine_labels or coarse_labels")
    names = _all_present(tree, _CIFAR100[options.split])
    (meta,) = _all_present(tree, ["meta"])
    with tree.open(meta) as file:
        stated = load_dict(file, tree.label(meta)).get(key.removesuffix("s") + "_names")
    classes = [_text(name) for name in stated] if isinstance(stated, list) else []
    count = {"fine_labels": 100, "coarse_labels": 20}[key]
    if len(classes) != count:
        raise DataError(f"{tree.label(meta)}: names {len(classes)} classes, not {count}; fetch it again")
    items = partial(_items, tree, names, 0, count, 32, key)
    rule = f"{key.replace('_', ' ')} of the batches"
    return _source("cifar100", tree, [*names, meta], items, rule, num_classes=count, classes=classes)


def _text(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


# ---- downsampled ImageNet --------------------------------------------------------------------------------------------


def open_imagenet(tree: Tree, options: Options) -> Source:
    """All batches of the split, which may lie in several folders or archives. Raises DataError."""
    names = _all_present(tree, _IMAGENET[options.split])
    count = sum(_npz_rows(tree, name) for name in names) if all(name.endswith(".npz") for name in names) else None
    facts = {"class_order": "that of downsampled ImageNet (Chrabaszcz), minus 1"}
    items = partial(_items, tree, names, 1, 1000)
    return _source("imagenet", tree, names, items, count=count, num_classes=1000, facts=facts)


def _npz(tree: Tree, name: str, first_label: int, classes: int) -> Iterator[Item]:
    path = tree.label(name)
    labels = read_array(tree, name, "labels")
    with array_file(tree, name, "data") as (file, shape, dtype):
        side = _side(path, dtype, shape)
        label = _labels(path, labels, shape[0], first_label, classes)
        for i, row in enumerate(rows(file, shape, dtype, path)):
            yield _item(f"{path}[{i}]", label(i), row.reshape(3, side, side))


def _npz_rows(tree: Tree, name: str) -> int:
    with array_file(tree, name, "data") as (_, shape, _):
        return shape[0]


# ---- both ------------------------------------------------------------------------------------------------------------


def _source(
    format: str, tree: Tree, names: Sequence[str], items: Callable[[], Iterator[Item]],
    rule: str = "labels of the batches", **more: Any,
) -> Source:  # fmt: skip
    return Source(format, "images", items, rule=rule, left_out=tree.left_out(names), **more)


def _items(
    tree: Tree, names: Sequence[str], first_label: int, classes: int, side: int | None = None, key: str = "labels"
) -> Iterator[Item]:
    for name in names:
        if name.endswith(".npz"):
            yield from _npz(tree, name, first_label, classes)
        else:
            with tree.open(name) as file:
                yield from _pickled(file, tree.label(name), first_label, classes, side, key)


def _all_present(tree: Tree, names: Sequence[str]) -> list[str]:
    """Where in the tree the files of these names lie, with .npz behind or not: the first where there are several."""
    found: dict[str, str] = {}
    for name in tree.names:
        found.setdefault(name.rpartition("/")[2].removesuffix(".npz"), name)
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{tree.path}: has no {', '.join(missing)}; the set is incomplete, fetch what is missing")
    return [found[name] for name in names]


def _pickled(file: BinaryIO, name: str, first_label: int, classes: int, side: int | None, key: str) -> Iterator[Item]:
    table = load_dict(file, name)
    missing = {"data", key} - table.keys()
    if missing:
        raise DataError(f"{name}: has no {' and no '.join(sorted(missing))}; pass the files as they were published")
    data = table["data"]
    if not isinstance(data, np.ndarray):
        raise DataError(f"{name}: data is a {type(data).__name__}, not an array; pass the files as they were published")
    found = _side(name, data.dtype, data.shape)
    if side not in (None, found):
        raise DataError(f"{name}: images are {found}x{found}, not {side}x{side}; pass --format imagenet for ImageNet")
    label = _labels(name, table[key], len(data), first_label, classes)
    for i, row in enumerate(data):
        yield _item(f"{name}[{i}]", label(i), row.reshape(3, found, found))


def _item(name: str, label: int, image: np.ndarray) -> Item:
    copy = image.copy()  # a view would keep the whole table in memory until the item is used
    return Item(name, label, lambda: copy)


def _side(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Side of the images in a table of planar RGB rows."""
    side = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
    if dtype != np.uint8 or side == 0 or shape[1:] != (3 * side * side,):
        raise DataError(f"{name}: data is {dtype} {shape}, not uint8 (n, 3 * side * side); pass it as it was published")
    return side


def _labels(name: str, labels: Any, count: int, first: int, classes: int) -> Callable[[int], int]:
    """i -> label of image i, starting at 0."""
    values = np.asarray(labels)
    if values.shape != (count,) or (count and values.dtype.kind not in "iu"):
        raise DataError(f"{name}: {count} images, but labels are {values.dtype} {values.shape}; fetch it again")
    wrong = np.flatnonzero((values < first) | (values >= first + classes))
    if len(wrong):
        i, last = wrong[0], first + classes - 1
        raise DataError(f"{name}: label {values[i]} of image {i} is outside {first} .. {last}; fetch it again")
    return lambda i: int(values[i]) - first
