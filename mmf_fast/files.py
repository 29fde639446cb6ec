"""Files that a crash leaves either old or new, never in part, and their checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["WriteError", "digest", "remove_drafts", "write_text", "writing"]


class WriteError(OSError, ValueError):
    """A file cannot be written. `filename` and `strerror` are there for callers with a better way out to name."""

    def __str__(self) -> str:
        return f"cannot write {self.filename} ({self.strerror}); choose a writable place"


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Gives a draft beside `path` to write to, then flushes it to the disk and renames it to `path`: whoever reads sees
    the old file or the new one, never a part.

    Makes the folder. A draft of a block that fails is removed; of a process that was killed, see `remove_drafts`.
    Raises WriteError.
    """
    path = Path(path)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        _flush(draft)
        os.replace(draft, path)
        _flush(path.parent)  # or a power cut may undo the rename, but not a later write
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            draft.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all. Raises WriteError (a full disk)."""
    with writing(path) as draft:
        draft.write_text(text)


def remove_drafts(folder: Path, pattern: str = "*") -> None:
    """Removes the drafts of processes that were killed while they wrote files whose names match `pattern`."""
    for draft in folder.glob(f"{pattern}.tmp"):
        draft.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """sha256 of a file, with a progress bar that goes away, on the first of several ranks. Raises OSError."""
    from tqdm import tqdm  # the loss and sampling do without it

    result = hashlib.sha256()
    size = path.stat().st_size
    other = int(os.environ.get("RANK", 0)) > 0
    bar = tqdm(desc=f"checking {path.name}", total=size, unit="B", unit_scale=True, leave=False, delay=1, disable=other)
    with open(path, "rb") as file, bar:
        while block := file.read(2**20):
            result.update(block)
            bar.update(len(block))
    return result.hexdigest()


def _flush(path: Path) -> None:
    """Flushes a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
