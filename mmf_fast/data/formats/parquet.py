"""Hugging Face parquet: a column of images {bytes, path} (or bytes alone) and one of labels, in one file or shards.

train-00000-of-00005.parquet, or train/0000.parquet; validation, test; on disk or in an archive. Read with pyarrow,
which is not a dependency.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from mmf_fast.data.formats.labels import LABELS, NOT_LABELS, numbering
from mmf_fast.data.formats.pixels import Pixels, survey
from mmf_fast.data.formats.sources import DataError, Item, Options, Source
from mmf_fast.data.formats.splits import split_of
from mmf_fast.data.formats.trees import Tree

__all__ = ["open_parquet"]

_ROWS = 64  # rows decoded from parquet at once


def open_parquet(tree: Tree, options: Options) -> Source:
    """A parquet file or a folder of shards, those of the split where their names tell it. Raises DataError."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{tree.path}: reading parquet needs pyarrow; pip install pyarrow") from error
    names = _shards(tree, options.split)
    readers = [_open(pq, tree, name) for name in names]
    schema, first = readers[0].schema_arrow, tree.label(names[0])
    for name, reader in zip(names, readers, strict=True):
        if reader.schema_arrow.names != schema.names or reader.schema_arrow.types != schema.types:
            raise DataError(f"{tree.label(name)}: its columns differ from those of {names[0]}; prepare them apart")
    image = _image_column(schema, first)
    label, rule = _label_column(schema, image, first, options)
    number, classes = _numbered(readers, tree, names, schema, label)
    count = sum(reader.metadata.num_rows for reader in readers)
    for reader in readers:
        reader.close()
    cells = ((row, partial(io.BytesIO, data)) for row, data, _ in _rows(pq, tree, names, image, None))
    pixels, looks = survey(cells, count, options)
    return Source(
        "parquet",
        "images",
        partial(_items, pq, tree, names, image, label, number, pixels),
        count=count,
        num_classes=len(classes) if classes else None,
        classes=classes,
        rule=rule,
        left_out=tree.left_out(names),
        looks=looks,
    )


def _items(
    pq: Any, tree: Tree, names: Sequence[str], image: str, label: str | None, number: Callable[[Any], int],
    pixels: Pixels,
) -> Iterator[Item]:  # fmt: skip
    for name, data, value in _rows(pq, tree, names, image, label):
        yield Item(name, None if label is None else number(value), partial(pixels.decode, data, name))


def _rows(pq: Any, tree: Tree, names: Sequence[str], image: str, label: str | None) -> Iterator[tuple[str, bytes, Any]]:
    """(name, encoded image, stated label) of each row."""
    columns = [image] if label is None else [image, label]
    for name in names:
        file, reader, row = tree.label(name), _open(pq, tree, name), 0
        try:
            for batch in reader.iter_batches(batch_size=_ROWS, columns=columns):
                labels = [None] * batch.num_rows if label is None else batch.column(label).to_pylist()
                for cell, value in zip(batch.column(image).to_pylist(), labels, strict=True):
                    data = cell.get("bytes") if isinstance(cell, dict) else cell
                    if not data:
                        raise DataError(
                            f"{file}[{row}]: has no image bytes, a path at most; embed the images in the parquet"
                        )
                    yield f"{file}[{row}]", data, value
                    row += 1
        except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file}: damaged after row {row} ({_line(error)}); fetch it again") from error
        finally:
            reader.close()


# ---- files -----------------------------------------------------------------------------------------------------------


def _open(pq: Any, tree: Tree, name: str) -> Any:
    """A reader; of a file in a zip, of its copy in a temporary file, since a table is read from its end."""
    file = tree.disk_path(name) or tree.unpacked(name)
    try:
        return pq.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{tree.label(name)}: damaged or truncated ({_line(error)}); fetch it again") from error


def _shards(tree: Tree, split: str) -> list[str]:
    names = [name for name in tree.names if name.lower().endswith(".parquet")]
    if names == [tree.path.name]:  # that very file was asked for
        return names
    splits = {name: _split(name) for name in names}
    if any(splits.values()):
        names = [name for name in names if splits[name] == split]
        words = {_word(name) for name in names}
        if len(words) > 1:  # validation and test: the first
            names = [name for name in names if _word(name) == ("test" if words == {"test"} else min(words - {"test"}))]
    elif split == "validation":
        names = []
    if not names:
        raise DataError(f"{tree.path}: has no parquet files of the {split} split; pass a file")
    folders = {name.rpartition("/")[0] for name in names}
    if len(folders) > 1:
        raise DataError(
            f"{tree.path}: has parquet files of {len(folders)} sets ({', '.join(sorted(folders)[:3])}); pass one"
        )
    totals = {int(found[1]) for name in names if (found := re.search(r"-of-(\d+)\.parquet$", name))}
    if totals and (len(totals) > 1 or len(names) != totals.pop()):
        raise DataError(
            f"{tree.path}: the {split} split has {len(names)} shards, their names tell of others; fetch them"
        )
    return names


def _word(name: str) -> str:
    """The part of the path that tells the split, without what numbers the shard."""
    parts = [part for part in reversed(name.split("/")) if split_of(part)]
    return re.split(r"[-.]", parts[0])[0] if parts else ""


def _split(name: str) -> str | None:
    return split_of(_word(name))


# ---- columns ---------------------------------------------------------------------------------------------------------


def _image_column(schema: Any, file: str) -> str:
    """A struct with `bytes`, or else the only column of bytes."""
    images = [field.name for field in schema if "bytes" in [sub.name for sub in _fields(field.type)]]
    images = images or [field.name for field in schema if str(field.type) in ("binary", "large_binary")]
    if len(images) != 1:
        raise DataError(f"{file}: has {len(images)} image columns {{bytes, path}}, not one; pass another file")
    return images[0]


def _label_column(schema: Any, image: str, file: str, options: Options) -> tuple[str | None, str]:
    """The column, None for no labels, and the rule. Raises DataError where several may be meant."""
    names = [name for name in schema.names if name != image]
    chosen = options.label_column
    if chosen is not None and chosen not in names:
        raise DataError(f"{file}: has no column {chosen!r}; pass --label-column, one of {', '.join(names)}")
    if chosen is not None:
        return chosen, f"column {chosen}, as told"
    if options.labels == "parents":
        raise DataError(f"{file}: is a table, without folders; pass --label-column NAME, or --labels none")
    if options.labels == "none":
        return None, "no labels, as told"
    named = [name for name in names if _class_names(schema, name)]
    found = sorted({*named, *(name for name in names if LABELS.fullmatch(name))}, key=names.index)
    doubtful = found or [name for name in names if not NOT_LABELS.fullmatch(name)]
    if len(found) == 1:
        return found[0], f"column {found[0]}"
    if not doubtful:
        return None, "no labels: no column for them"
    what = "which of the columns holds the labels" if len(doubtful) > 1 else "whether this column holds the labels"
    kinds = ", ".join(f"{name} ({schema.field(name).type})" for name in doubtful)
    raise DataError(f"{file}: {kinds}: {what}? pass --label-column {doubtful[0]}, or --labels none")


def _numbered(
    readers: Sequence[Any], tree: Tree, names: Sequence[str], schema: Any, label: str | None
) -> tuple[Callable[[Any], int], list[str] | None]:
    """Reads the label column of all shards, without the images."""
    if label is None:
        return int, None
    values: dict[Any, None] = {}
    for name, reader in zip(names, readers, strict=True):
        file = tree.label(name)
        kind = str(schema.field(label).type)
        try:
            for group in range(reader.num_row_groups):
                column = reader.read_row_group(group, columns=[label]).column(label)
                if kind.startswith(("list", "large_list", "fixed_size_list", "struct", "map", "extension")):
                    numbering(column.slice(0, 1).to_pylist(), f"{file}: column {label}")  # raises
                values |= dict.fromkeys(column.unique().to_pylist())
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file}: damaged ({_line(error)}); fetch it again") from error
    number, classes = numbering(values, f"{tree.path if len(names) > 1 else tree.label(names[0])}: column {label}")
    return number, _class_names(schema, label) or classes


def _class_names(schema: Any, column: str) -> list[str] | None:
    """Class names, which the `datasets` library writes beside the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _fields(kind: Any) -> list[Any]:
    return [kind.field(i) for i in range(kind.num_fields)]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
