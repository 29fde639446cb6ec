"""A prepared set: one folder that training maps into memory.

    samples.npy    (N, C, H, W) uint8 images or float16 latents
    labels.npy     (N,) int64, where there are labels
    manifest.json  what they are, where they come from, their checksums; written last: without it there is no set

`mmf prepare FOLDER --check` compares the checksums.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmf_fast.data.formats.sources import DataError
from mmf_fast.files import digest

__all__ = [
    "LABELS",
    "MANIFEST",
    "SAMPLES",
    "Manifest",
    "PreparedSet",
    "open_pair",
    "open_prepared",
    "read_manifest",
    "verify",
]

SAMPLES, LABELS, MANIFEST = "samples.npy", "labels.npy", "manifest.json"
_VERSION = 2
_READ = (1, 2)  # version 1 had no statistics
_DTYPES = {"images": "uint8", "latents": "float16"}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json, key by key.

    shape: of one sample.  classes: their names, where the source tells.  source: path, format, options.
    facts: of latents: holds ("mean-std" or "sample"), scaled_by, flipped.  skipped: samples that could not be read.
    statistics: of latents as they are stored: mean and std of each channel, where they are "from", and as "measured".
    report: for humans: the rule that told samples and labels, what was left out, how many samples each class has.
    files: {name: {"bytes": int, "sha256": str}}.
    """

    kind: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    num_classes: int
    classes: list[str] | None
    source: dict[str, Any]
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    statistics: dict[str, Any] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    version: int = _VERSION

    @property
    def identity(self) -> str:
        """Equal for equal sets, in whatever folder they are: a checksum of their checksums and facts."""
        content = [self.kind, self.num_classes, self.facts, {name: file["sha256"] for name, file in self.files.items()}]
        content += [self.statistics] if self.statistics else []
        return "sha256 " + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


@dataclass(frozen=True)
class PreparedSet:
    """samples (N, C, H, W) uint8 or float16, mapped and read-only; labels (N,) int64 or None."""

    manifest: Manifest
    samples: np.ndarray
    labels: Tensor | None


def open_prepared(folder: str | Path, kind: str) -> PreparedSet:
    """Maps a prepared set after comparing sizes, shapes and label range with its manifest.

    kind: "images" or "latents". Raises DataError.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.kind != kind:
        raise DataError(f"{folder}: holds {manifest.kind}; use data.name={manifest.kind}")
    samples = _mapped(folder / SAMPLES, manifest, (manifest.count, *manifest.shape), np.dtype(manifest.dtype))
    if LABELS not in manifest.files:
        return PreparedSet(manifest, samples, None)
    labels = torch.from_numpy(_mapped(folder / LABELS, manifest, (manifest.count,), np.dtype(np.int64)).copy())
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= manifest.num_classes:
        raise DataError(f"{folder / LABELS}: labels {low} .. {high} of {manifest.num_classes} classes; {_AGAIN}")
    return PreparedSet(manifest, samples, labels)


def open_pair(
    kind: str, path: str | Path, validation: str | Path | None, check: bool
) -> tuple[PreparedSet, PreparedSet | None]:
    """The training and the validation set, which must be alike. check: compares checksums first. Raises DataError."""
    folders = [path] if validation is None else [path, validation]
    for key, folder in zip(("path", "validation"), folders, strict=False):
        if not os.path.exists(folder):
            raise DataError(
                f"{folder}: does not exist; make it: mmf prepare SRC {folder}, or where it has moved: data.{key}=FOLDER"
            )
    if check:
        for folder in folders:
            verify(folder)
    train, *rest = [open_prepared(folder, kind) for folder in folders]
    if not rest:
        return train, None
    for key in ("shape", "num_classes", "classes", "facts"):
        one, other = getattr(train.manifest, key), getattr(rest[0].manifest, key)
        if one != other:
            raise DataError(f"{validation}: {key} is {other}, that of {path} is {one}; prepare both alike")
    return train, rest[0]


_AGAIN = "prepare the set again (mmf prepare)"


def read_manifest(folder: Path) -> Manifest:
    """Raises DataError where it is missing, damaged, or of another version."""
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text())
        found = tree["version"]
        if found not in _READ:
            raise DataError(f"{path}: is of version {found}, this program reads up to {_VERSION}; {_AGAIN}")
        manifest = Manifest(**{**tree, "shape": tuple(tree["shape"])})
        if manifest.dtype != _DTYPES[manifest.kind] or manifest.count < 1 or not manifest.shape:
            raise ValueError(f"{manifest.count} {manifest.kind} of {manifest.dtype} {manifest.shape}")
        if manifest.kind == "latents" and not {"holds", "scaled_by", "flipped"} <= manifest.facts.keys():
            raise ValueError(f"facts are {manifest.facts}")
        if manifest.kind == "latents" and found > 1 and not {"mean", "std"} <= (manifest.statistics or {}).keys():
            raise ValueError(f"statistics are {manifest.statistics}")
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"{folder}: is no prepared set ({MANIFEST}: {error.strerror}); make one: mmf prepare SRC {folder}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); {_AGAIN}") from error
    return manifest


def _mapped(path: Path, manifest: Manifest, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        size, expected = path.stat().st_size, manifest.files[path.name]["bytes"]
        if size != expected:
            raise ValueError(f"{size} bytes, not {expected}")
        array = np.load(path, mmap_mode="r")
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{array.dtype} {array.shape}, not {dtype} {shape}")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(f"{path}: is not what its manifest says ({error}); {_AGAIN}") from error
    return np.asarray(array)  # a plain view of the mapping


# ---- checksums -------------------------------------------------------------------------------------------------------


def verify(folder: str | Path) -> Manifest:
    """Reads every file of the set and compares its sha256. Raises DataError that names the damaged file."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        try:
            found = digest(folder / name)
        except OSError as error:
            raise DataError(f"{folder / name}: cannot be read ({error.strerror}); {_AGAIN}") from error
        if found != expected["sha256"]:
            raise DataError(f"{folder / name}: damaged, its sha256 is not the one in {MANIFEST}; {_AGAIN}")
    return manifest
