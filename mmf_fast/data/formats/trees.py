"""A zip archive or a folder, seen alike: sorted names of files, each of which can be read."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

from mmf_fast.data.formats.sources import DataError, SampleError, check_member, identity_of_files, identity_of_names

__all__ = ["Tree", "open_tree"]


class Tree:
    """names: sorted, with / between folders, without hidden files.  A folder; `_Zip` is an archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = []
        for root, folders, files in os.walk(path, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            prefix = "" if Path(root) == path else Path(root).relative_to(path).as_posix() + "/"
            self.names += [prefix + name for name in files if not name.startswith(".")]
        self.names.sort()

    def read(self, name: str) -> bytes:
        """The content of one file; may be called from any thread. Raises SampleError."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise SampleError(f"{self.label(name)}: cannot be read ({error.strerror})") from error

    def label(self, name: str) -> str:
        """What errors call a file."""
        return str(self.path / name)

    def identity(self) -> str:
        return identity_of_names(self.names)


class _Zip(Tree):
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise DataError(f"{path}: damaged or truncated ({error}); fetch it again") from error
        for name in self.archive.namelist():
            check_member(path, name)
        hidden = (".", "__MACOSX")
        files = [name for name in self.archive.namelist() if not name.endswith("/")]
        self.names = sorted(name for name in files if not name.startswith(hidden) and "/." not in name)

    def read(self, name: str) -> bytes:
        try:
            return self.archive.read(name)  # compares the checksum
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            raise SampleError(f"{self.label(name)}: cannot be read ({error})") from error

    def label(self, name: str) -> str:
        return f"{self.path}:{name}"

    def identity(self) -> str:
        return identity_of_files([self.path])


def open_tree(path: Path) -> Tree:
    """Raises DataError for a damaged archive."""
    return Tree(path) if path.is_dir() else _Zip(path)
