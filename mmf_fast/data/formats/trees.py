"""Folders and archives as one tree of files: it lists all of them in sorted order and can read each.

An archive counts as a folder wherever it lies: it may be the source, lie in a folder, or in another archive (ImageNet
is a tar of tars). Nothing is unpacked but a compressed tar, into a temporary file: it cannot be read out of order.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from mmf_fast.data.formats.containers import (
    ARCHIVES,
    BROKEN,
    Container,
    Folder,
    open_archive,
    open_container,
    seekable,
    stem,
)
from mmf_fast.data.formats.sources import DataError, SampleError, identity_of_files, identity_of_names

__all__ = ["Tree", "ending", "identity_of", "some"]

_HIDDEN = {
    *("__MACOSX", "Icon\r", "Thumbs.db", "ehthumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"),
    *("@eaDir", "lost+found", "__pycache__"),
}
_DATED = (".parquet", "dataset.json", "config.json", "stats.pt")
_FEW = 1000  # files


class Tree:
    """All files of a source, by names that are sorted and have / between folders.

    A path that is neither a folder nor an archive is the only file of its tree.
    ignore: patterns (as of a shell) of names of files and folders that are left out; hidden ones always are.
    names: of the files.  folders: which are listed as such, empty ones too.  hidden: number of entries left out.
    Raises DataError for an archive that is damaged, holds a name twice, or lies beside what was unpacked from it.
    """

    def __init__(self, path: Path, ignore: Sequence[str] = ()) -> None:
        self.path, self.ignore = path, tuple(ignore)
        self.names: list[str] = []
        self.folders: set[str] = set()
        self.hidden = 0
        self._containers: dict[str, Container] = {}  # by the folder that each stands for
        self._add("", open_container(path))
        self.names.sort()
        twice = [name for name, other in pairwise(self.names) if name == other]
        if twice:
            raise DataError(f"{self.label(twice[0])}: is there twice, and {len(twice) - 1} other names; pack it anew")

    def open(self, name: str) -> BinaryIO:
        """A seekable file. Raises DataError."""
        container, member = self._find(name)
        return container.open(member)

    def unpacked(self, name: str) -> BinaryIO:
        """A file in which seeking is cheap: what a zip holds is unpacked into a temporary file. Raises DataError."""
        container, member = self._find(name)
        return seekable(container.bytes_of(member))

    def read(self, name: str) -> bytes:
        """The content of one file; may be called from any thread. Raises SampleError."""
        container, member = self._find(name)
        try:
            return container.read(member)
        except OSError as error:
            raise SampleError(f"{self.label(name)}: cannot be read ({error.strerror or error})") from error
        except (*BROKEN, RuntimeError, NotImplementedError) as error:
            raise SampleError(f"{self.label(name)}: cannot be read ({error})") from error

    def label(self, name: str) -> str:
        """What errors call a file."""
        container, member = self._find(name)
        return container.label(member)

    def disk_path(self, name: str) -> Path | None:
        """Where the file lies on disk, None where it lies in an archive."""
        container, member = self._find(name)
        return container.path / member if isinstance(container, Folder) else None

    def place(self, at: str) -> str:
        """What errors call a folder, given with a / at its end; "" is the source itself."""
        return str(self.path) if not at else f"{self.path}/{at[:-1]}"

    def left_out(self, taken: Iterable[str], within: tuple[str, ...] = ("",)) -> dict[str, int]:
        """{ending: files that are not taken}, and hidden ones."""
        used = set(taken)
        missed = (name for name in self.names if name not in used and name.startswith(within))
        found = dict(Counter(ending(name) or "no ending" for name in missed).most_common())
        return {**found, "hidden or ignored": self.hidden} if self.hidden else found

    def _find(self, name: str) -> tuple[Container, str]:
        folder = name
        while folder := folder.rpartition("/")[0]:
            if folder in self._containers:
                return self._containers[folder], name[len(folder) + 1 :]
        return self._containers[""], name

    def _add(self, folder: str, container: Container) -> None:
        prefix, archives = folder + "/" if folder else "", []
        self._containers[folder] = container
        for entry in container.entries():
            if _is_hidden(entry, self.ignore):
                self.hidden += 1
            elif entry.endswith("/"):
                self.folders.add(prefix + entry[:-1])
            elif entry.lower().endswith(ARCHIVES):
                archives.append(entry)
            else:
                self.names.append(prefix + entry)
        taken = {parent for name in self.names for parent in _parents(name)} | self.folders if archives else set()
        for entry in archives:
            base = entry.rpartition("/")[2]
            inner = prefix + entry[: len(entry) - len(base)] + stem(base)
            if _is_hidden(inner, self.ignore):
                self.hidden += 1
                continue
            if inner in self._containers or inner in taken:
                raise DataError(
                    f"{container.label(entry)}: lies beside {stem(base)}, perhaps the same twice; "
                    f"pass --ignore {base} (or the other)"
                )
            self.folders.add(inner)
            self._add(inner, open_archive(container.bytes_of(entry), container.label(entry), container.disk(entry)))


def identity_of(path: Path, ignore: Sequence[str] = ()) -> str:
    """Changes with the content of a source as far as names tell; of archives, tables and few files sizes and dates.

    Asking a network file system for a million dates takes long, and unpacking an archive too.
    """
    if path.is_file():
        return identity_of_names([*ignore, identity_of_files([path])])
    names = sorted(name for name in Folder(path).entries() if not _is_hidden(name, ignore))
    dated = [name for name in names if len(names) <= _FEW or name.lower().endswith((*ARCHIVES, *_DATED))]
    files = [file for name in dated if (file := path / name).exists()]  # a link may lead nowhere
    return identity_of_names([*ignore, *names, identity_of_files(files)])


def _is_hidden(entry: str, ignore: Sequence[str]) -> bool:
    parts = entry.rstrip("/").split("/")
    if any(part.startswith(".") or part in _HIDDEN for part in parts):
        return True
    return any(fnmatch(part, pattern) for pattern in ignore for part in (*parts, entry))


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition("/")[0]:
        yield name


def ending(name: str) -> str:
    """Of a file, in small letters, such as .png; the last one."""
    return posixpath.splitext(name)[1].lower()


def some(names: Iterable[str]) -> str:
    """The first of them in sorted order, as errors list them."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
