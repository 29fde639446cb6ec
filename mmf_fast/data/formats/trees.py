"""Folders and archives, seen alike: one walk gives the sorted names of all files, each of which can be read.

An archive counts as a folder wherever it lies: it may be the source, lie in a folder, or in another archive (ImageNet
is a tar of tars). Nothing is unpacked but a compressed tar, into a temporary file: it cannot be read out of order.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import posixpath
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from mmf_fast.data.formats.sources import DataError, SampleError, check_member, identity_of_files, identity_of_names

__all__ = ["Tree", "ending", "identity_of"]

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_HIDDEN = {
    *("__MACOSX", "Icon\r", "Thumbs.db", "ehthumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"),
    *("@eaDir", "lost+found", "__pycache__"),
}
_DATED = (".parquet", "dataset.json", "config.json", "stats.pt")
_FEW = 1000  # files
_PACKED: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
}
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError, ValueError)


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
        self._containers: dict[str, _Container] = {}  # by the folder that each stands for
        self._add("", _open_container(path))
        self.names.sort()
        twice = [name for name, other in pairwise(self.names) if name == other]
        if twice:
            raise DataError(f"{self.label(twice[0])}: is there twice, and {len(twice) - 1} other names; pack it anew")

    def open(self, name: str) -> BinaryIO:
        """A seekable file. Raises DataError."""
        container, member = self._find(name)
        return container.open(member)

    def read(self, name: str) -> bytes:
        """The content of one file; may be called from any thread. Raises SampleError."""
        container, member = self._find(name)
        try:
            return container.read(member)
        except OSError as error:
            raise SampleError(f"{self.label(name)}: cannot be read ({error.strerror or error})") from error
        except (*_BROKEN, RuntimeError, NotImplementedError) as error:
            raise SampleError(f"{self.label(name)}: cannot be read ({error})") from error

    def label(self, name: str) -> str:
        """What errors call a file."""
        container, member = self._find(name)
        return container.label(member)

    def disk_path(self, name: str) -> Path | None:
        """Where the file lies on disk, None where it lies in an archive."""
        container, member = self._find(name)
        return container.path / member if isinstance(container, _Folder) else None

    def _find(self, name: str) -> tuple[_Container, str]:
        folder = name
        while folder := folder.rpartition("/")[0]:
            if folder in self._containers:
                return self._containers[folder], name[len(folder) + 1 :]
        return self._containers[""], name

    def _add(self, folder: str, container: _Container) -> None:
        prefix, archives = folder + "/" if folder else "", []
        self._containers[folder] = container
        for entry in container.entries():
            if _is_hidden(entry, self.ignore):
                self.hidden += 1
            elif entry.endswith("/"):
                self.folders.add(prefix + entry[:-1])
            elif entry.lower().endswith(_ARCHIVES):
                archives.append(entry)
            else:
                self.names.append(prefix + entry)
        taken = {parent for name in self.names for parent in _parents(name)} | self.folders if archives else set()
        for entry in archives:
            base = entry.rpartition("/")[2]
            stem = prefix + entry[: len(entry) - len(base)] + _stem(base)
            if _is_hidden(stem, self.ignore):
                self.hidden += 1
                continue
            if stem in self._containers or stem in taken:
                raise DataError(
                    f"{container.label(entry)}: lies beside {_stem(base)}, perhaps the same twice; "
                    f"pass --ignore {base} (or the other)"
                )
            self.folders.add(stem)
            self._add(stem, _open_archive(container.bytes_of(entry), container.label(entry), container.disk(entry)))


def identity_of(path: Path, ignore: Sequence[str] = ()) -> str:
    """Changes with the content of a source as far as names tell; of archives, tables and few files sizes and dates.

    Asking a network file system for a million dates takes long, and unpacking an archive too.
    """
    if path.is_file():
        return identity_of_names([*ignore, identity_of_files([path])])
    names = sorted(name for name in _Folder(path).entries() if not _is_hidden(name, ignore))
    dated = [name for name in names if len(names) <= _FEW or name.lower().endswith((*_ARCHIVES, *_DATED))]
    return identity_of_names([*ignore, *names, identity_of_files(path / name for name in dated)])


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


def _stem(name: str) -> str:
    return name[: -max(len(kind) for kind in _ARCHIVES if name.lower().endswith(kind))]


# ---- bytes that can be read anywhere, from any thread ----------------------------------------------------------------


class _Bytes(Protocol):
    size: int

    def read_at(self, start: int, size: int) -> bytes: ...


class _File:
    """A file on disk, opened for every read: a folder of a thousand archives is within the limit on open files."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size

    def read_at(self, start: int, size: int) -> bytes:
        with open(self.path, "rb", buffering=0) as file:
            return _pread(file.fileno(), start, size)


class _Span:
    """A part of other bytes: a member of a tar."""

    def __init__(self, base: _Bytes, start: int, size: int) -> None:
        self.base, self.start, self.size = base, start, size

    def read_at(self, start: int, size: int) -> bytes:
        return self.base.read_at(self.start + start, max(0, min(size, self.size - start)))


class _Unpacked:
    """A temporary file, which goes with the process."""

    def __init__(self, source: BinaryIO, label: str) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the tree
        try:
            shutil.copyfileobj(source, self.file, 2**20)
            self.file.flush()
        except _BROKEN as error:
            raise DataError(f"{label}: damaged or truncated ({error}); fetch it again") from error
        except OSError as error:
            where = tempfile.gettempdir()
            raise DataError(f"{label}: cannot be unpacked in {where} ({error}); set TMPDIR to a larger disk") from error
        self.size = self.file.tell()

    def read_at(self, start: int, size: int) -> bytes:
        return _pread(self.file.fileno(), start, size)


class _Window(io.RawIOBase):
    """A file object over `_Bytes`."""

    def __init__(self, content: _Bytes) -> None:
        self.content, self.position = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self.position, self.content.size)[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")  # zipfile looks for this
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        found = self.content.read_at(self.position, len(buffer))
        buffer[: len(found)] = found
        self.position += len(found)
        return len(found)


def _pread(file: int, start: int, size: int) -> bytes:
    """Linux reads 2 GiB at most at once."""
    pieces = []
    while size and (piece := os.pread(file, size, start)):
        pieces.append(piece)
        start, size = start + len(piece), size - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _file(content: _Bytes) -> BinaryIO:
    return io.BufferedReader(_Window(content))


# ---- folders and archives --------------------------------------------------------------------------------------------


class _Container:
    """What holds files: entries() names them, and its folders with a / behind."""

    def entries(self) -> Iterator[str]:
        raise NotImplementedError

    def open(self, member: str) -> BinaryIO:
        return _file(self.bytes_of(member))

    def read(self, member: str) -> bytes:
        content = self.bytes_of(member)
        found = content.read_at(0, content.size)
        if len(found) != content.size:
            raise EOFError(f"ends after {len(found)} of {content.size} bytes")
        return found

    def bytes_of(self, member: str) -> _Bytes:
        raise NotImplementedError

    def label(self, member: str) -> str:
        raise NotImplementedError

    def disk(self, member: str) -> Path | None:
        return None


class _Folder(_Container):
    def __init__(self, path: Path, only: str | None = None) -> None:
        self.path, self.only = path, only

    def entries(self) -> Iterator[str]:
        if self.only is not None:
            yield self.only
            return
        for root, folders, files in os.walk(self.path, followlinks=True, onerror=_raise):
            real = os.path.realpath(root) + os.sep
            folders[:] = [  # a link to a folder above would go round for ever
                name
                for name in folders
                if not os.path.islink(os.path.join(root, name))
                or not real.startswith(os.path.realpath(os.path.join(root, name)) + os.sep)
            ]
            prefix = "" if Path(root) == self.path else Path(root).relative_to(self.path).as_posix() + "/"
            yield from (f"{prefix}{name}/" for name in folders)
            yield from (prefix + name for name in files)

    def read(self, member: str) -> bytes:
        return (self.path / member).read_bytes()

    def open(self, member: str) -> BinaryIO:
        return open(self.path / member, "rb")

    def bytes_of(self, member: str) -> _Bytes:
        return _File(self.path / member)

    def label(self, member: str) -> str:
        return str(self.path / member)

    def disk(self, member: str) -> Path | None:
        return self.path / member


def _raise(error: OSError) -> None:
    raise error


class _Archive(_Container):
    """file: where it lies on disk, None within another archive."""

    def __init__(self, name: str, file: Path | None) -> None:
        self.name, self.file = name, file

    def label(self, member: str) -> str:
        return f"{self.name}:{member}"


class _Zip(_Archive):
    def __init__(self, content: _Bytes, name: str, file: Path | None) -> None:
        super().__init__(name, file)
        self.archive = zipfile.ZipFile(_file(content))
        for member in self.archive.namelist():
            check_member(Path(name), member)
        foreign = [member for member in self.archive.namelist() if "\\" in member]  # written by some Windows programs
        self.alias = {member.replace("\\", "/"): member for member in foreign}

    def entries(self) -> Iterator[str]:
        for member in self.archive.namelist():
            yield member.replace("\\", "/")

    def read(self, member: str) -> bytes:
        return self.archive.read(self.alias.get(member, member))  # compares the checksum

    def open(self, member: str) -> BinaryIO:
        return self.archive.open(self.alias.get(member, member))  # type: ignore[return-value]

    def bytes_of(self, member: str) -> _Bytes:
        with self.open(member) as file:
            return _Unpacked(file, self.label(member))


class _Tar(_Archive):
    def __init__(self, content: _Bytes, name: str, file: Path | None) -> None:
        super().__init__(name, file)
        self.content, self.listed = content, list[str]()
        self.places: dict[str, tuple[int, int]] = {}
        links: dict[str, str] = {}
        with tarfile.open(fileobj=_file(content), mode="r:") as archive:
            for member in archive:
                check_member(Path(name), member.name)
                entry = posixpath.normpath(member.name)
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if member.isdir():
                    self.listed += [entry + "/"] * (entry != ".")
                    continue
                if member.isreg() and not member.issparse():
                    self.places[entry] = (member.offset_data, member.size)
                elif member.islnk():
                    links[entry] = posixpath.normpath(member.linkname)
                elif member.issym():
                    links[entry] = posixpath.normpath(posixpath.join(posixpath.dirname(entry), member.linkname))
                else:
                    raise DataError(f"{name}:{entry}: is no plain file; pack the folder anew, without --sparse")
                self.listed.append(entry)
            end = content.read_at(max(0, content.size - 1024), 1024)
        if self.places and any(end):  # two empty blocks are the end; Python's tarfile takes the lack of them for it
            raise DataError(f"{name}: damaged or truncated (it has no end); fetch it again")
        for entry, target in links.items():
            if target not in self.places:
                raise DataError(f"{name}:{entry}: is a link to {target}, which is not there; pack with --dereference")
            self.places[entry] = self.places[target]

    def entries(self) -> Iterator[str]:
        return iter(self.listed)

    def bytes_of(self, member: str) -> _Bytes:
        return _Span(self.content, *self.places[member])


def _open_container(path: Path) -> _Container:
    if path.is_dir():
        return _Folder(path)
    if path.name.lower().endswith(_ARCHIVES):
        return _open_archive(_File(path), str(path), path)
    return _Folder(path.parent, only=path.name)


def _open_archive(content: _Bytes, name: str, file: Path | None) -> _Archive:
    try:
        packed = next((unpack for magic, unpack in _PACKED.items() if content.read_at(0, 2) == magic), None)
        if packed:
            with packed(_file(content)) as stream:
                return _Tar(_Unpacked(stream, name), name, file)
        if name.lower().endswith(".zip"):
            return _Zip(content, name, file)
        return _Tar(content, name, file)
    except DataError:
        raise
    except _BROKEN as error:
        what = "is no zip, or a truncated one" if name.lower().endswith(".zip") else "damaged or truncated"
        raise DataError(f"{name}: {what} ({error}); fetch it again") from error
