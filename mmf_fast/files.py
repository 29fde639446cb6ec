"""Files that a crash leaves either old or new, never in part, and their checksums."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO

from tqdm import tqdm

__all__ = ["digest", "flush", "flush_folder", "write_atomically"]


def digest(path: Path) -> str:
    """sha256 of a file, with a progress bar that goes away, on the first of several ranks. Raises OSError."""
    result = hashlib.sha256()
    size = path.stat().st_size
    other = int(os.environ.get("RANK", 0)) > 0
    bar = tqdm(desc=f"checking {path.name}", total=size, unit="B", unit_scale=True, leave=False, delay=1, disable=other)
    with open(path, "rb") as file, bar:
        while block := file.read(2**20):
            result.update(block)
            bar.update(len(block))
    return result.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a crash leaves either the old content or the new. Raises OSError (a full disk)."""
    draft = path.with_name(path.name + ".tmp")
    with open(draft, "w") as file:
        file.write(text)
        flush(file)
    os.replace(draft, path)
    flush_folder(path.parent)


def flush(file: IO) -> None:
    """Down to the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """The names in it down to the disk: without this, a rename may be lost that a later write survives."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
