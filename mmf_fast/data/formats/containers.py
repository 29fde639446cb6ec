"""Containers of files: a folder, a zip, a tar, an archive within another. Any thread can read any member."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from mmf_fast.data.formats.sources import DataError, check_member

__all__ = ["ARCHIVES", "BROKEN", "Archive", "Container", "Folder", "open_archive", "open_container", "seekable", "stem"]

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_NO_ARCHIVES = (".npz", ".pt", ".pth")  # which are zip files, but not of samples
_PACKED: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
}
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError, ValueError)


def stem(name: str) -> str:
    """The name of an archive without .zip, .tar.gz, ...: the name of the folder that it would be unpacked to."""
    return name[: -max(len(kind) for kind in ARCHIVES if name.lower().endswith(kind))]


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
    """A temporary copy, which is deleted when the process ends."""

    def __init__(self, source: BinaryIO, label: str) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the tree
        try:
            shutil.copyfileobj(source, self.file, 2**20)
            self.file.flush()
        except BROKEN as error:
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
            raise ValueError("negative seek position")  # zipfile catches this error
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


def seekable(content: _Bytes) -> BinaryIO:
    """A file object, in which seeking is cheap."""
    return io.BufferedReader(_Window(content))


# ---- folders and archives --------------------------------------------------------------------------------------------


class Container:
    """What holds files: entries() names them, and its folders with a / behind."""

    def entries(self) -> Iterator[str]:
        raise NotImplementedError

    def open(self, member: str) -> BinaryIO:
        return seekable(self.bytes_of(member))

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


class Folder(Container):
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


class Archive(Container):
    """file: where it lies on disk, None within another archive."""

    def __init__(self, name: str, file: Path | None) -> None:
        self.name, self.file = name, file

    def label(self, member: str) -> str:
        return f"{self.name}:{member}"


class _Zip(Archive):
    def __init__(self, content: _Bytes, name: str, file: Path | None) -> None:
        super().__init__(name, file)
        self.archive = zipfile.ZipFile(seekable(content))
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


class _Tar(Archive):
    def __init__(self, content: _Bytes, name: str, file: Path | None) -> None:
        super().__init__(name, file)
        self.content, self.listed = content, list[str]()
        self.places: dict[str, tuple[int, int]] = {}
        links: dict[str, str] = {}
        with tarfile.open(fileobj=seekable(content), mode="r:") as archive:
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
        if self.places and any(end):  # a whole tar ends with two empty blocks; Python's tarfile does not miss them
            raise DataError(f"{name}: damaged or truncated (it has no end); fetch it again")
        for entry, target in links.items():
            if target not in self.places:
                raise DataError(f"{name}:{entry}: is a link to {target}, which is not there; pack with --dereference")
            self.places[entry] = self.places[target]

    def entries(self) -> Iterator[str]:
        return iter(self.listed)

    def bytes_of(self, member: str) -> _Bytes:
        return _Span(self.content, *self.places[member])


def open_container(path: Path) -> Container:
    if path.is_dir():
        return Folder(path)
    if path.name.lower().endswith(ARCHIVES) or (
        path.suffix.lower() not in _NO_ARCHIVES and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))
    ):
        return open_archive(_File(path), str(path), path)
    return Folder(path.parent, only=path.name)


def open_archive(content: _Bytes, name: str, file: Path | None) -> Archive:
    try:
        packed = next((unpack for magic, unpack in _PACKED.items() if content.read_at(0, 2) == magic), None)
        if packed:
            with packed(seekable(content)) as stream:
                return _Tar(_Unpacked(stream, name), name, file)
        if name.lower().endswith(".zip") or content.read_at(0, 2) == b"PK":
            return _Zip(content, name, file)
        return _Tar(content, name, file)
    except DataError:
        raise
    except BROKEN as error:
        what = "is no zip, or a truncated one" if name.lower().endswith(".zip") else "damaged or truncated"
        raise DataError(f"{name}: {what} ({error}); fetch it again") from error
