"""IDX files: MNIST, Fashion-MNIST, KMNIST, QMNIST, EMNIST; gzipped or not, whatever their names say.

    train-images-idx3-ubyte[.gz], train-labels-idx1-ubyte[.gz], t10k-..., emnist-letters-train-images-idx3-ubyte.gz
    4 bytes: 0, 0, type, number of dimensions; each dimension as a big-endian int32; the numbers

EMNIST's images lie on their sides in the files (columns before rows) and are turned upright.
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mmf_fast.data.formats.arrays import rows, source_of_rows
from mmf_fast.data.formats.sources import DataError, Options, Source
from mmf_fast.data.formats.splits import split_of
from mmf_fast.data.formats.trees import Tree

__all__ = ["IDX_NAME", "open_idx"]

IDX_NAME = re.compile(
    r"(?P<set>.*?)(?P<split>train|t10k|test\d*k?|val(idation)?)?[-_.]?"
    r"(?P<what>images|labels)[-._]?idx\d[-._]?(ubyte|int)(\.gz)?",
    re.IGNORECASE,
)
_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def open_idx(tree: Tree, options: Options) -> Source:
    """Raises DataError where a file is missing, damaged, or does not fit the other."""
    found: dict[tuple[str, str | None], dict[str, str]] = {}
    for name in tree.names:
        if match := IDX_NAME.fullmatch(name.rpartition("/")[2]):
            split = "validation" if (match["split"] or "").lower() == "t10k" else split_of(match["split"] or "")
            found.setdefault((match["set"].lower(), split), {}).setdefault(match["what"].lower(), name)
    some_split = any(split for _, split in found)
    wanted = [key for key in found if key[1] == (options.split if some_split else None)]
    if len(wanted) != 1 or (not some_split and options.split == "validation"):
        names = ", ".join(f"{title}{split or ''}" for title, split in found)
        raise DataError(
            f"{tree.path}: which set is meant of {names} ({options.split})? pass --ignore PATTERN for others"
        )
    files = found[wanted[0]]
    missing = {"images", "labels"} - files.keys()
    if "images" in missing or (missing and options.labels != "none"):
        raise DataError(
            f"{tree.path}: the {options.split} split has no {missing.pop()} file; pass the folder that holds both, "
            "or --labels none"
        )
    place = tree.label(files["images"])
    with _numbers(tree, files["images"]) as (_, shape, dtype):
        if len(shape) != 3 or dtype != np.uint8 or 0 in shape:
            raise DataError(f"{place}: is {dtype} {shape}, not uint8 (n, rows, columns); pass the file as published")
    stated = None
    if options.labels != "none":
        stated = _labels(tree, files["labels"], shape[0])
    sideways = "emnist" in place.rpartition("/")[2].lower()

    def images() -> Iterator[np.ndarray]:
        with _numbers(tree, files["images"]) as (file, shape, dtype):
            for row in rows(file, shape, dtype, place):
                yield (row.T if sideways else row)[None]
            if file.read(1):
                raise DataError(f"{place}: goes on behind its {shape[0]} images; fetch it again")

    rule = ("labels of the idx file" if stated is not None else "no labels, as told") + ", upright" * sideways
    return source_of_rows("idx", tree, [*files.values()], images, shape[0], stated, rule, place)


def _labels(tree: Tree, name: str, count: int) -> np.ndarray:
    place = tree.label(name)
    with _numbers(tree, name) as (file, shape, dtype):
        if len(shape) not in (1, 2) or shape[0] != count or dtype.kind not in "iu":
            raise DataError(f"{place}: is {dtype} {shape}, not the labels of {count} images; fetch both again")
        values = np.stack([row.copy() for row in rows(file, shape, dtype, place)])
        if file.read(1):
            raise DataError(f"{place}: goes on behind its {count} labels; fetch it again")
    return values if values.ndim == 1 else values[:, 0]  # QMNIST: the class, then who wrote it


@contextmanager
def _numbers(tree: Tree, name: str) -> Iterator[tuple[Any, tuple[int, ...], np.dtype]]:
    """(file at the first number, shape, dtype); what is packed is told by its first bytes, not by its name."""
    place = tree.label(name)
    try:
        with tree.open(name) as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file: Any = gzip.GzipFile(fileobj=raw) if packed else raw
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES or not 1 <= head[3] <= 4:
                raise DataError(f"{place}: does not begin as an IDX file does ({head.hex(' ')}); fetch it again")
            shape = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
            yield file, shape, np.dtype(_TYPES[head[2]])
    except DataError:
        raise
    except (gzip.BadGzipFile, zlib.error, EOFError, struct.error) as error:
        raise DataError(f"{place}: damaged or truncated ({error}); fetch it again") from error
