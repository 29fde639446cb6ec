"""Readers of the formats that datasets come in. All walk through a set in bounded memory and in a fixed order.

To add a format: a function (Tree, Options) -> `Source` in a file of its own, entered in `FORMATS` and in `detect`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mmf_fast.data.formats.arrays import holds_images, open_arrays
from mmf_fast.data.formats.batches import open_cifar10, open_cifar100, open_imagenet
from mmf_fast.data.formats.idx import IDX_NAME, open_idx
from mmf_fast.data.formats.images import IMAGE_ENDINGS, open_images
from mmf_fast.data.formats.latents import LATENT_ENDINGS, open_latents
from mmf_fast.data.formats.parquet import open_parquet
from mmf_fast.data.formats.sources import DataError, Item, Options, SampleError, Source
from mmf_fast.data.formats.trees import Tree, ending, identity_of

__all__ = ["FORMATS", "DataError", "Item", "Options", "SampleError", "Source", "detect", "identity_of", "open_source"]


class Format(NamedTuple):
    """open: reads it.  options: what it knows besides split and ignore."""

    open: Callable[[Tree, Options], Source]
    options: frozenset[str]


_LAYOUT = {"root", "labels", "allow_empty"}
_PIXELS = {"size", "channels", "background"}
FORMATS = {
    "cifar10": Format(open_cifar10, frozenset()),
    "cifar100": Format(open_cifar100, frozenset({"label_column"})),
    "imagenet": Format(open_imagenet, frozenset()),
    "idx": Format(open_idx, frozenset({"labels"})),
    "arrays": Format(open_arrays, frozenset({"labels", "label_column"})),
    "images": Format(open_images, frozenset({*_LAYOUT, *_PIXELS})),
    "parquet": Format(open_parquet, frozenset({"labels", "label_column", *_PIXELS})),
    "latents": Format(open_latents, frozenset({*_LAYOUT, "latents"})),
}


def open_source(path: Path, format: str | None = None, **options: Any) -> Source:
    """The set at `path`. format: a key of `FORMATS`, detected where it is None.  options: see `Options`.

    Raises DataError, also where an option does not go with the format.
    """
    if not path.exists():
        raise DataError(f"{path}: does not exist; pass the archive or folder as it was downloaded")
    chosen = Options(**options)
    try:
        tree = Tree(path, chosen.ignore)
        name = format or _format_of(tree)
        for option in chosen.given().keys() - {"split", "ignore"} - FORMATS[name].options:
            raise DataError(f"{path}: is {name}; leave --{option.replace('_', '-')} out")
        return replace(FORMATS[name].open(tree, chosen), identity=identity_of(path, chosen.ignore))
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error


def detect(path: Path) -> str:
    """The format of an archive or folder, by the names in it. Raises DataError where they tell of none."""
    return _format_of(Tree(path))


def _format_of(tree: Tree) -> str:
    bases = [name.rpartition("/")[2] for name in tree.names]
    stems = {base.removesuffix(".npz") for base in bases}
    if stems & {"data_batch_1", "test_batch"}:
        return "cifar10"
    if "meta" in stems and stems & {"train", "test"}:
        return "cifar100"
    if stems & {"train_data_batch_1", "val_data"}:
        return "imagenet"
    if any(IDX_NAME.fullmatch(base) for base in bases):
        return "idx"
    if "data.mdb" in bases:
        raise DataError(
            f"{tree.path}: is an LMDB, often of pickles, which is not read; export it as npz or safetensors"
        )
    endings = {ending(name) for name in tree.names}
    if ".parquet" in endings and endings & set(IMAGE_ENDINGS):
        raise DataError(f"{tree.path}: holds parquet and image files; pass --format parquet or --format images")
    for format, known in {"parquet": {".parquet"}, "images": IMAGE_ENDINGS, "latents": LATENT_ENDINGS}.items():
        if endings & set(known):
            return "arrays" if format == "latents" and holds_images(tree) else format
    raise DataError(f"{tree.path}: holds nothing of a known format; pass --format, one of {', '.join(FORMATS)}")
