"""What a reader of a format hands over: a `Source`, which yields one `Item` per sample, always in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

__all__ = ["DataError", "Item", "SampleError", "Source", "check_member", "identity_of_files", "identity_of_names"]

Kind = Literal["images", "latents"]


class DataError(ValueError):
    """Data that cannot be used; the message is one line that names the file and the way out."""


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
class Source:
    """A set of samples in some format.

    items: starts a new pass over the samples; raises DataError where the source is damaged.
    count: None where only reading tells.  num_classes: None where the largest label tells.
    identity: changes with the content as far as names, sizes and dates tell; a restart compares it.
    facts: further entries of the manifest.
    """

    format: str
    kind: Kind
    items: Callable[[], Iterator[Item]]
    identity: str
    count: int | None = None
    num_classes: int | None = None
    classes: list[str] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


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
