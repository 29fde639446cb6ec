"""Readers of the formats that datasets come in. All walk through a set in bounded memory and in a fixed order.

To add a format: a function path, ... -> `Source` in a file of its own, entered in `FORMATS` and in `detect`.
"""

from __future__ import annotations

import os
import zipfile
from itertools import islice
from pathlib import Path

from mmf_fast.data.formats.batches import open_cifar10, open_imagenet
from mmf_fast.data.formats.images import IMAGE_ENDINGS, open_images
from mmf_fast.data.formats.latents import open_latents
from mmf_fast.data.formats.parquet import open_parquet
from mmf_fast.data.formats.sources import DataError, Item, SampleError, Source

__all__ = ["FORMATS", "DataError", "Item", "SampleError", "Source", "detect", "open_source"]

FORMATS = ("cifar10", "imagenet", "images", "parquet", "latents")
_LOOKED_AT = 10_000  # names by which a folder or zip is judged


def open_source(
    path: Path, format: str | None = None, split: str = "train", size: int | None = None, latents: str | None = None
) -> Source:
    """The set at `path`. format: one of `FORMATS`, detected where it is None.

    split: train or validation, where a format holds both.  size: centre-crops and resizes images.
    latents: what latents hold, see latents.py. Raises DataError.
    """
    if not path.exists():
        raise DataError(f"{path}: does not exist; pass the archive or folder as it was downloaded")
    format = format or detect(path)
    if size is not None and format not in ("images", "parquet"):
        raise DataError(f"{path}: {format} has one size; leave --size out")
    if latents is not None and format != "latents":
        raise DataError(f"{path}: is {format}; leave --latents out")
    try:
        if format == "cifar10":
            return open_cifar10(path, split)
        if format == "imagenet":
            return open_imagenet(path, split)
        if format == "parquet":
            return open_parquet(path, split, size)
        if format == "latents":
            return open_latents(path, split, latents)
        return open_images(path, split, size)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error


def detect(path: Path) -> str:
    """The format of an archive or folder, by the names in it. Raises DataError where they tell of none."""
    if path.is_file():
        name = path.name.lower()
        if name.endswith((".tar.gz", ".tgz")):
            return "cifar10"
        if name.endswith(".parquet"):
            return "parquet"
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path}: is no zip, tar.gz or parquet file, or a truncated one; fetch it again")
    names = _names(path)
    stems = {name.rpartition("/")[2].removesuffix(".npz") for name in names}
    if stems & {"data_batch_1", "test_batch"}:
        return "cifar10"
    if stems & {"train_data_batch_1", "val_data"}:
        return "imagenet"
    for format, endings in {
        "parquet": (".parquet",),
        "images": IMAGE_ENDINGS,
        "latents": (".npy", ".npz"),
    }.items():
        if any(name.lower().endswith(endings) for name in names):
            return format
    raise DataError(f"{path}: holds nothing of a known format; pass --format, one of {', '.join(FORMATS)}")


def _names(path: Path) -> list[str]:
    if path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.namelist()[:_LOOKED_AT]
        except (zipfile.BadZipFile, ValueError) as error:
            raise DataError(f"{path}: damaged or truncated ({error}); fetch it again") from error
    walk = (os.path.join(root, name) for root, _, files in os.walk(path, followlinks=True) for name in files)
    return list(islice(walk, _LOOKED_AT))
