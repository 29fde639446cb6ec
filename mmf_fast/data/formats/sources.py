"""What a reader of a format hands over: a `Source`, which yields one `Item` per sample, always in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

__all__ = [
    "DataError",
    "Item",
    "Options",
    "SampleError",
    "Source",
    "check_member",
    "identity_of_files",
    "identity_of_names",
]

Kind = Literal["images", "latents"]


class DataError(ValueError):
    """Data that cannot be used; the message is one line that names the file and says what to do."""


class SampleError(DataError):
    """One sample cannot be read, the others may be whole: a user can choose to leave it out."""


class Item(NamedTuple):
    """One sample, not yet decoded.

    name: what errors and the manifest call it.  label: None in a set without labels.
    load: decodes it, in any thread: images (C, H, W) uint8, latents (C, h, w) of a float dtype. Raises SampleError.
    """

    name: str
    label: int | None
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Options:
    """What decides how a source is read, where there is a choice; a format says which of these it knows.

    split: train or validation, where the source holds both.
    root: the folder, within the source, that holds the class folders.
    ignore: patterns of names that are left out.
    labels: "none", or "parents": the class of a file is the folder it lies in.  label_column: of a table.
    allow_empty: class folders without a sample keep their number.
    size: images are centre-cropped and resized to this side.
    channels: 1 or 3, of images of which some are greyscale and some are not.
    background: colour below transparent pixels, or "none".
    latents: what latents hold, see latents.py.
    """

    split: str = "train"
    root: str | None = None
    ignore: tuple[str, ...] = ()
    labels: str | None = None
    label_column: str | None = None
    allow_empty: bool = False
    size: int | None = None
    channels: int | None = None
    background: str | None = None
    latents: str | None = None

    def given(self) -> dict[str, Any]:
        """The options that are not as by default."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True)
class Source:
    """A set of samples in some format.

    items: starts a new pass over the samples; raises DataError where the source is damaged.
    identity: changes with the content as far as names, sizes and dates tell; a restart compares it.
    count: None where only reading tells.  num_classes: None where the largest label tells.
    facts: what else training has to know of the samples.
    statistics: of latents: mean and std of each channel, or one for all, and "from"; None: to be measured.
    rule: what decided which files are samples and what their labels are.  left_out: {kind: files that are not samples}.
    looks: {kind: how many of the images are of it}.
    """

    format: str
    kind: Kind
    items: Callable[[], Iterator[Item]]
    identity: str = ""  # filled in by open_source
    count: int | None = None
    num_classes: int | None = None
    classes: list[str] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] | None = None
    rule: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    looks: dict[str, int] = field(default_factory=dict)


def check_member(archive: Path, name: str) -> None:
    """Raises DataError for a member of an archive that points out of it: no honest tool writes one."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
        raise DataError(f"{archive}: member {name!r} points out of the archive; do not trust it, fetch another copy")


def identity_of_files(paths: Iterable[Path]) -> str:
    """Of a few files, by name, size and date."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def identity_of_names(names: Iterable[str]) -> str:
    """Of very many files, by name alone: asking a network file system for a million dates takes long."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()
