"""Images as arrays: one .npz (or some .npy) with all images of a split in one array and all labels in another.

    x_train, y_train, x_test, y_test            Keras
    train_images, train_labels, val_images, ... MedMNIST
    kmnist-train-imgs.npz, ...-labels.npz       KMNIST, Kuzushiji-49: one array in each
    arr_0, arr_1                                guided-diffusion: images, and labels perhaps
    images, labels                              or y, classes, targets, ...

An array of images is uint8: (N, H, W), (N, H, W, C) or (N, C, H, W). It is streamed, never held whole.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mmf_fast.data.formats.labels import LABELS, NOT_LABELS, numbering
from mmf_fast.data.formats.sources import DataError, Item, Options, Source
from mmf_fast.data.formats.splits import split_of
from mmf_fast.data.formats.trees import Tree

__all__ = ["array_file", "holds_images", "open_arrays", "read_array", "rows", "source_of_rows"]

_ROWS = 256  # rows read at once
_MOST = 32  # files; of more, each holds one sample


class _Array(NamedTuple):
    """One array of a tree: in the file `name`, an .npz holding it as `key`."""

    name: str
    key: str | None
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def title(self) -> str:
        return self.key if self.key and self.key != "arr_0" else self.name.rpartition("/")[2]

    @property
    def word(self) -> str:
        """The word in the name of file or array that says which split it is: train, val, test; else empty."""
        words = re.split(r"[^a-z]+", f"{self.name.rpartition('/')[2]} {self.key or ''}".lower())
        return next((word for word in words if split_of(word)), "")

    @property
    def stem(self) -> str:
        """Its title without ending and split: y of y_train, kmnist_labels of kmnist-train-labels.npz."""
        words = re.split(r"[-_.\s]+", re.sub(r"\.np[yz]$", "", self.title, flags=re.IGNORECASE))
        return "_".join(word for word in words if not split_of(word))


def holds_images(tree: Tree) -> bool:
    """Whether the numpy files of a tree are few, and one of their arrays is of many images."""
    try:
        return any(_is_images(array) for array in _arrays(tree))
    except DataError:
        return False


def open_arrays(tree: Tree, options: Options) -> Source:
    """Raises DataError where images or labels may be one array or another."""
    arrays = _arrays(tree)
    images = _images_of([array for array in arrays if _is_images(array)], tree, options)
    labels = None if options.labels == "none" else _labels_of(images, arrays, tree, options.label_column)
    count = images.shape[0]
    place = f"{tree.label(images.name)}{f'[{images.key}]' if images.key else ''}"
    stated = None
    if labels is not None:
        stated = read_array(tree, labels.name, labels.key)
        stated = stated.reshape(count) if stated.shape == (count, 1) else stated
    channels_last = _channels_last(images.shape, place)
    with array_file(tree, images.name, images.key):
        pass  # before anything is written: its rows lie one after the other

    def pixels(row: np.ndarray) -> np.ndarray:
        row = row[None] if row.ndim == 2 else row
        return row.transpose(2, 0, 1) if channels_last else row

    def items() -> Iterator[np.ndarray]:
        with array_file(tree, images.name, images.key) as (file, shape, dtype):
            yield from (pixels(row) for row in rows(file, shape, dtype, place))

    rule = f"images {images.title}, " + (f"labels {labels.title}" if labels else "no labels")
    return source_of_rows(
        "arrays", tree, [images.name, *([labels.name] if labels else [])], items, count, stated, rule, place
    )


def source_of_rows(
    format: str, tree: Tree, names: Sequence[str], images: Any, count: int, stated: Any, rule: str, place: str
) -> Source:
    """Of a table of `count` images (C, H, W), which images() yields, and of what it states as labels, or None."""
    number, classes = numbering(stated.tolist(), place) if stated is not None else (int, None)
    labels = None if stated is None else [number(value) for value in stated.tolist()]

    def items() -> Iterator[Item]:
        for i, image in enumerate(images()):
            yield Item(f"{place}[{i}]", None if labels is None else labels[i], partial(np.array, image, order="C"))

    known = len(classes) if classes else None
    missed = tree.left_out(names)
    return Source(format, "images", items, count=count, num_classes=known, classes=classes, rule=rule, left_out=missed)


def _arrays(tree: Tree) -> list[_Array]:
    names = [name for name in tree.names if name.lower().endswith((".npz", ".npy"))]
    if len(names) > _MOST:
        return []
    found = []
    for name in names:
        keys: list[str | None] = [None]
        if name.lower().endswith(".npz"):
            with _zip(tree, name) as archive:
                keys = [member.removesuffix(".npy") for member in archive.namelist()]
        for key in keys:
            with array_file(tree, name, key, any_order=True) as (_, shape, dtype):
                found.append(_Array(name, key, shape, dtype))
    return found


def _is_images(array: _Array) -> bool:
    return (
        array.dtype == np.uint8
        and len(array.shape) in (3, 4)
        and min(array.shape, default=0) > 0
        and (
            len(array.shape) == 4 or array.shape[2] > 4  # (H, W, 3) is one image
        )
    )


def _images_of(arrays: Sequence[_Array], tree: Tree, options: Options) -> _Array:
    """The array of the split that is meant."""
    if any(array.word for array in arrays):
        arrays = [array for array in arrays if split_of(array.word) == options.split]
        arrays = [array for array in arrays if not array.word.startswith("test")] or arrays  # val before test
    elif options.split == "validation":
        arrays = []
    if len(arrays) != 1:
        titles = _titles(arrays) or f"none of the {options.split} split"
        raise DataError(f"{tree.path}: which array holds the images: {titles}? pass --ignore, or another file")
    return arrays[0]


def _labels_of(images: _Array, arrays: Sequence[_Array], tree: Tree, chosen: str | None) -> _Array | None:
    """The array that the user chose, or that is called as labels are; None where none may be meant.

    It has a row for each image. Raises DataError where it has not, or where it cannot be told.
    """
    count, way_out = images.shape[0], "pass --label-column NAME, or --labels none"
    rest = [array for array in arrays if not _is_images(array) and array.word in (images.word, "")]
    if chosen is None:
        named = [array for array in rest if LABELS.fullmatch(array.stem)]
    else:
        named = [array for array in rest if chosen in (array.key, array.title)]

    def fit(arrays: Sequence[_Array]) -> list[_Array]:
        return [array for array in arrays if array.shape[:1] == (count,) and len(array.shape) < 3]

    found = fit(named)
    if len(found) == 1:
        return found[0]
    if named and not found:
        raise DataError(
            f"{tree.path}: {named[0].title} is of shape {named[0].shape}, not a label for each of {count} images; "
            f"save it as ({count},), or {way_out}"
        )
    if chosen is not None and not named:
        raise DataError(f"{tree.path}: has no array {chosen!r} of labels, but {_titles(rest) or 'none'}; {way_out}")
    doubtful = found or fit([array for array in rest if not NOT_LABELS.fullmatch(array.stem)])
    if not doubtful:
        return None
    if images.key == "arr_0" and [array.key for array in doubtful] == ["arr_1"]:
        return doubtful[0]  # numpy's names for what guided-diffusion saves without any
    raise DataError(f"{tree.path}: which array holds the labels: {_titles(doubtful)}? {way_out}")


def _titles(arrays: Sequence[_Array]) -> str:
    return ", ".join(array.title for array in arrays)


def _channels_last(shape: tuple[int, ...], place: str) -> bool:
    first, last = len(shape) == 4 and shape[1] in (1, 3), len(shape) == 4 and shape[3] in (1, 3)
    if len(shape) == 4 and first == last:
        raise DataError(
            f"{place}: of {shape}, which are the 1 or 3 channels cannot be told; save images as (N, H, W, 3)"
        )
    return last


# ---- numpy's files, without pickles ----------------------------------------------------------------------------------


@contextmanager
def array_file(
    tree: Tree, name: str, key: str | None, any_order: bool = False
) -> Iterator[tuple[BinaryIO, tuple[int, ...], np.dtype]]:
    """(file at the first number, shape, dtype) of an .npy, or of an array of an .npz; damage becomes DataError.

    any_order: also of an array whose rows do not lie one after the other, which is not read.
    """
    place = tree.label(name)
    try:
        if key is None:
            with tree.open(name) as file:
                yield file, *_header(file, place, any_order)
            return
        with _zip(tree, name) as archive:
            if f"{key}.npy" not in archive.namelist():
                raise DataError(f"{place}: has no {key}.npy, but {', '.join(archive.namelist()[:4])}; fetch it again")
            with archive.open(f"{key}.npy") as member:
                yield member, *_header(member, place, any_order)  # type: ignore[misc]  # IO[bytes]
                member.read(1)  # zipfile compares its checksum at the end
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise DataError(f"{place}: damaged or truncated ({error}); fetch it again") from error


def read_array(tree: Tree, name: str, key: str | None) -> np.ndarray:
    """A small one, whole."""
    place = tree.label(name)
    with array_file(tree, name, key) as (file, shape, dtype):
        if dtype.hasobject:
            raise DataError(f"{place}: {key or 'it'} is pickled; save numbers or text instead")
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(_exactly(file, size, place), dtype).reshape(shape)


def rows(file: Any, shape: tuple[int, ...], dtype: np.dtype, place: str) -> Iterator[np.ndarray]:
    """The rows of an array, one by one."""
    row = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
    for first in range(0, shape[0], _ROWS):
        count = min(_ROWS, shape[0] - first)
        yield from np.frombuffer(_exactly(file, count * row, place), dtype).reshape(count, *shape[1:])


@contextmanager
def _zip(tree: Tree, name: str) -> Iterator[zipfile.ZipFile]:
    try:
        with tree.open(name) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(f"{tree.label(name)}: damaged or truncated ({error}); fetch it again") from error


def _header(file: Any, place: str, any_order: bool) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran and len(shape) > 1 and not any_order:
        raise DataError(f"{place}: is {shape} in Fortran order; save it with numpy.ascontiguousarray")
    return shape, dtype


def _exactly(file: Any, size: int, place: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise DataError(f"{place}: data ends early; fetch it again")
    return data
