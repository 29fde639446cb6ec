"""Hugging Face parquet: an image column {bytes, path} and a label column, in one file or several shards.

train-00000-of-00005.parquet, validation-..., test-...; read with pyarrow, which is not a dependency.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmf_fast.data.formats.images import decode_image
from mmf_fast.data.formats.sources import DataError, Item, Source, identity_of_files

__all__ = ["open_parquet"]

_SPLITS = {"train": ["train"], "validation": ["validation", "valid", "val", "test"]}
_LABELS = ["label", "labels", "fine_label"]
_ROWS = 64  # rows decoded from parquet at once


def open_parquet(path: Path, split: str, size: int | None) -> Source:
    """A parquet file or a folder of shards, those of the split where their names tell it. Raises DataError."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from error
    files = _shards(path, split)
    readers = [_open(pq, file) for file in files]
    image, label = _columns(readers[0].schema_arrow, files[0])
    classes = _classes(readers[0].schema_arrow.metadata, label)
    for file, reader in zip(files, readers, strict=True):
        if _columns(reader.schema_arrow, file) != (image, label):
            raise DataError(f"{file}: its columns differ from those of {files[0].name}; prepare them apart")
    count = sum(reader.metadata.num_rows for reader in readers)
    for reader in readers:
        reader.close()
    items = partial(_items, pq, files, image, label, size)
    return Source(
        "parquet", "images", items, identity_of_files(files), count, len(classes) if classes else None, classes
    )


def _items(pq: Any, files: Sequence[Path], image: str, label: str | None, size: int | None) -> Iterator[Item]:
    columns = [image] if label is None else [image, label]
    for file in files:
        reader, row = _open(pq, file), 0
        try:
            for batch in reader.iter_batches(batch_size=_ROWS, columns=columns):
                labels = [None] * batch.num_rows if label is None else batch.column(label).to_pylist()
                for cell, value in zip(batch.column(image).to_pylist(), labels, strict=True):
                    yield _item(f"{file}[{row}]", cell, value, label is not None, size)
                    row += 1
        except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file}: damaged after row {row} ({_line(error)}); fetch it again") from error
        finally:
            reader.close()


def _item(name: str, cell: dict[str, Any] | None, label: Any, labelled: bool, size: int | None) -> Item:
    data = (cell or {}).get("bytes")
    if not data:
        raise DataError(f"{name}: has no image bytes (a path alone is not enough); embed the images in the parquet")
    if labelled and (type(label) is not int or label < 0):
        raise DataError(f"{name}: label is {label!r}, not a number from 0; test splits often have none, pass another")
    return Item(name, label, partial(decode_image, data, name, size))


def _open(pq: Any, file: Path) -> Any:
    try:
        return pq.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: damaged or truncated ({_line(error)}); fetch it again") from error


def _shards(path: Path, split: str) -> list[Path]:
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if path.is_dir():
        known = {name for names in _SPLITS.values() for name in names}
        if any(_split(file) in known for file in files):
            name = next((name for name in _SPLITS[split] if any(_split(file) == name for file in files)), None)
            files = [file for file in files if _split(file) == name]
        elif split == "validation":
            files = []
    if not files:
        raise DataError(f"{path}: has no parquet files of the {split} split; pass a file")
    totals = {int(found[1]) for file in files if (found := re.search(r"-of-(\d+)\.parquet$", file.name))}
    if totals and (len(totals) > 1 or len(files) != totals.pop()) and path.is_dir():
        raise DataError(f"{path}: the {split} split has {len(files)} shards, their names tell of others; fetch them")
    return files


def _split(file: Path) -> str:
    return re.split(r"[-.]", file.name)[0]


def _columns(schema: Any, file: Path) -> tuple[str, str | None]:
    """Names of the image column, a struct with `bytes`, and of the label column."""
    images = [field.name for field in schema if "bytes" in [sub.name for sub in _fields(field.type)]]
    if len(images) != 1:
        raise DataError(f"{file}: has {len(images)} image columns {{bytes, path}}, not one; pass another file")
    return images[0], next((name for name in _LABELS if name in schema.names), None)


def _fields(kind: Any) -> list[Any]:
    return [kind.field(i) for i in range(kind.num_fields)]


def _classes(metadata: dict[bytes, bytes] | None, label: str | None) -> list[str] | None:
    """Class names, which the `datasets` library writes beside the schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
