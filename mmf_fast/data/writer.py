"""Writes a prepared set so that a kill at any moment costs some seconds and never leaves a set that is not whole.

Samples and labels are appended; every so often they are flushed to disk and `progress.json` then says how far they are
good. A restart cuts the files there and goes on. The array headers say 0 samples until the end, and the manifest, which
makes the folder a set, is written last.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from mmf_fast.data.formats import DataError, Item, Source
from mmf_fast.data.normalization import Running, contradiction
from mmf_fast.data.prepared import LABELS, MANIFEST, SAMPLES, Manifest
from mmf_fast.files import digest, write_text

__all__ = ["Writer"]

_PROGRESS = "progress.json"
_EVERY = 1024  # samples between two flushes


class Writer:
    """Appends the samples of `source` to the set in `folder`: with Writer(...) as writer: add, skip, finish.

    options: whatever else decides the content; a restart with other options starts from the beginning.
    seen: items of the source that an earlier run has dealt with already.
    Raises DataError where another process writes there, where samples do not fit each other, or the disk is full.
    """

    def __init__(self, folder: Path, source: Source, options: dict[str, Any]) -> None:
        self.folder = folder
        self.source = source
        self.key = {"identity": source.identity, "format": source.format, **options}
        self.seen = self.count = 0
        self.skipped: list[str] = []
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.uint8 if source.kind == "images" else np.float16)
        self.highest = -1  # largest label so far
        self.labelled = False
        self.measured = self._measuring()
        self._samples: _Appender | None = None
        self._labels: _Appender | None = None

    def __enter__(self) -> Writer:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise DataError(
                f"{self.folder}: another process prepares a set there; wait, or pass another OUT"
            ) from error
        except OSError:
            pass  # a file system without locks
        self._go_on()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for appender in (self._samples, self._labels):
            if appender:
                appender.close()
        os.close(self._lock)

    def add(self, item: Item, sample: np.ndarray) -> None:
        """Raises DataError where shape or label do not fit those before."""
        if not self.shape:
            self._begin(item, sample)
        if sample.shape != self.shape:
            remedy = "pass --size to crop and resize all" if self.source.kind == "images" else "encode them alike"
            raise DataError(f"{item.name}: is {_by(sample.shape)}, those before are {_by(self.shape)}; {remedy}")
        if (item.label is not None) != self.labelled:
            raise DataError(f"{item.name}: some samples have labels and some have none; mend the labels")
        stored = sample.astype(self.dtype, copy=False)
        self._samples.append(stored)  # type: ignore[union-attr]  # _begin has opened it
        if self.measured:
            self.measured.add(stored)
        if self._labels and item.label is not None:
            classes = self.source.num_classes
            if classes is not None and not 0 <= item.label < classes:
                raise DataError(f"{item.name}: label {item.label} is outside 0 .. {classes - 1}; mend the labels")
            self._labels.append(np.int64(item.label))
            self.highest = max(self.highest, item.label)
        self.count += 1
        self._advance()

    def skip(self, item: Item) -> None:
        """Leaves out a sample that cannot be read."""
        self.skipped.append(item.name)
        self._advance()

    def finish(self, origin: dict[str, Any]) -> Manifest:
        """Publishes the set. origin: `source` of the manifest."""
        if self._samples is None:
            raise DataError(f"{self.folder}: no sample could be read; see the errors above")
        files = {}
        for name, appender in ((SAMPLES, self._samples), (LABELS, self._labels)):
            if appender:
                appender.finish(self.count)
                path = self.folder / name
                files[name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
        manifest = Manifest(
            kind=self.source.kind,
            count=self.count,
            shape=self.shape,
            dtype=str(self.dtype),
            num_classes=(self.source.num_classes or self.highest + 1) if self.labelled else 0,
            classes=self.source.classes if self.labelled else None,
            source=origin,
            files=files,
            facts=self.source.facts,
            skipped=self.skipped,
            statistics=self._statistics(),
            report=self._report(),
        )
        write_text(self.folder / MANIFEST, manifest.text())
        (self.folder / _PROGRESS).unlink(missing_ok=True)
        return manifest

    def _measuring(self, state: dict[str, Any] | None = None) -> Running | None:
        facts = self.source.facts
        return Running(facts["holds"] == "mean-std", 1 + facts["flipped"], state) if "holds" in facts else None

    def _statistics(self) -> dict[str, Any] | None:
        """Of latents, as the source states them, or else as measured. Raises DataError where they do not fit."""
        if self.measured is None:
            return None
        measured, stated = self.measured.result(), self.source.statistics
        if stated is None:
            return {**measured, "from": "measured", "measured": measured}
        channels = len(measured["mean"])
        if len(stated["mean"]) not in (1, channels):
            raise DataError(
                f"{stated['from']}: states {len(stated['mean'])} channels, latents have {channels}; mend it"
            )
        whole = {key: stated[key] * (channels // len(stated[key])) for key in ("mean", "std")}
        if wrong := contradiction(whole, measured):
            tqdm.write(f"{stated['from']}: {wrong}; with --ignore of that file they are used", file=sys.stderr)
        return {**whole, "from": stated["from"], "measured": measured}

    def _report(self) -> dict[str, Any]:
        """What was taken by which rule, what was left out, and how many samples each class has."""
        report: dict[str, Any] = {"rule": self.source.rule, "left_out": self.source.left_out}
        if self.source.looks:
            report["images"] = self.source.looks
        if self.labelled:
            classes = self.source.num_classes or self.highest + 1
            counts = np.bincount(np.load(self.folder / LABELS, mmap_mode="r"), minlength=classes).tolist()
            names = self.source.classes or range(classes)
            report["classes"] = {str(name): count for name, count in zip(names, counts, strict=True)}
        return report

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Goes on where an earlier run on the same source stopped; starts from the beginning if there was none."""
        try:
            state = json.loads((self.folder / _PROGRESS).read_text())
            if state["key"] != json.loads(json.dumps(self.key)):
                raise ValueError("another source")
            shape, labelled = tuple(state["shape"]), state["labelled"]
            self._samples = _Appender(self.folder / SAMPLES, shape, self.dtype, state["count"])
            if labelled:
                self._labels = _Appender(self.folder / LABELS, (), np.dtype(np.int64), state["count"])
        except (OSError, ValueError, KeyError, TypeError):
            self._samples = self._labels = None
            for name in (_PROGRESS, SAMPLES, LABELS):
                (self.folder / name).unlink(missing_ok=True)
            return
        self.shape, self.labelled, self.highest = shape, labelled, state["highest"]
        self.seen, self.count, self.skipped = state["seen"], state["count"], state["skipped"]
        self.measured = self._measuring(state["measured"])

    def _begin(self, item: Item, sample: np.ndarray) -> None:
        needed = (self.source.count or 0) * (sample.size * self.dtype.itemsize + 8)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise DataError(f"{self.folder}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; make room")
        self.shape, self.labelled = sample.shape, item.label is not None
        self._samples = _Appender(self.folder / SAMPLES, self.shape, self.dtype)
        if self.labelled:
            self._labels = _Appender(self.folder / LABELS, (), np.dtype(np.int64))

    def _advance(self) -> None:
        self.seen += 1
        if self.seen % _EVERY or self._samples is None:
            return
        self._samples.flush()
        if self._labels:
            self._labels.flush()
        state = {
            "key": self.key,
            "seen": self.seen,
            "count": self.count,
            "shape": self.shape,
            "labelled": self.labelled,
            "highest": self.highest,
            "skipped": self.skipped,
            "measured": self.measured and self.measured.state(),
        }
        write_text(self.folder / _PROGRESS, json.dumps(state))


class _Appender:
    """An .npy file that grows: numpy pads the header so that any length fits into it later.

    count: of an existing file, the samples to keep; ValueError where it holds fewer. None: a new file.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype, count: int | None = None) -> None:
        self.shape, self.dtype = shape, dtype
        self.file: BinaryIO = open(path, "wb" if count is None else "r+b")  # noqa: SIM115  # closed by close()
        if count is None:
            self._header(0)
            return
        start, row = _header_size(shape, dtype), dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        end = self.file.seek(0, os.SEEK_END)
        if end < start + count * row:
            self.file.close()
            raise ValueError(f"{path} is shorter than its progress says")
        self.file.truncate(start + count * row)
        self.file.seek(start + count * row)

    def append(self, value: Any) -> None:
        self.file.write(np.ascontiguousarray(value).data)

    def flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self, count: int) -> None:
        self.flush()
        self.file.seek(0)
        self._header(count)
        self.flush()

    def close(self) -> None:
        self.file.close()

    def _header(self, count: int) -> None:
        np.lib.format.write_array_header_1_0(self.file, _description((count, *self.shape), self.dtype))


def _description(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    return {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}


def _header_size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, _description((0, *shape), dtype))
    return buffer.tell()


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
