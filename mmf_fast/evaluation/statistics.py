"""Means and covariances of image features: summed over ranks in float64, and read from what other projects publish.

| file | keys |
|---|---|
| .npz of pytorch-fid, torch-fidelity, clean-fid, EDM | mu (D,), sigma (D, D) |
| .npz of ADM | the same; its samples arr_0 are not read |
| .pkl of EDM2 | {"fid": {"mu", "sigma"}, ...}, read without running code |
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmf_fast.data.formats.pickles import load_dict
from mmf_fast.data.formats.sources import DataError
from mmf_fast.files import writing

__all__ = ["Statistics", "Sums", "read_statistics", "write_statistics"]


class Statistics(NamedTuple):
    """mean (D,) and cov (D, D), float64."""

    mean: np.ndarray
    cov: np.ndarray


class Sums:
    """Running sums from which mean and covariance follow: N, sum of x, sum of x x^T, over the features (N, D) that this
    process has seen, in float64."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.first = torch.zeros(dim, dtype=torch.float64, device=device)
        self.second = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        x = features.double()
        self.count += len(x)
        self.first += x.sum(dim=0)
        self.second.addmm_(x.T, x)

    def reduce(self) -> Statistics:
        """mean = s / n, cov = (S - n mean mean^T) / (n - 1), from the sums of all ranks. Every rank must call this,
        once, and gets the result."""
        if dist.is_initialized():
            for part in (self.count, self.first, self.second):
                dist.all_reduce(part)
        mean = self.first / self.count
        cov = (self.second - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Statistics(mean.cpu().numpy(), cov.cpu().numpy())


def read_statistics(path: str | Path) -> Statistics:
    """The statistics in a file of one of the formats above. Raises DataError that names the file and what is wrong."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            zipped = zipfile.is_zipfile(file)
            file.seek(0)
            found = _from_npz(path) if zipped else _from_pickle(load_dict(file, str(path)), path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; pass the .npz or .pkl of reference statistics") from error
    return _checked(found, path)


def write_statistics(path: str | Path, statistics: Statistics) -> None:
    """An .npz that every project above reads. Raises ValueError where it cannot be written."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: statistics are written as .npz; choose such a name")
    with writing(path) as draft, open(draft, "wb") as file:
        np.savez(file, mu=statistics.mean, sigma=statistics.cov)


def _from_npz(path: Path) -> Mapping[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] if key in ("mu", "sigma") else None for key in archive.files}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise DataError(f"{path}: damaged ({' '.join(str(error).split())}); fetch it again") from error


def _from_pickle(tree: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    found = tree.get("fid")
    if not isinstance(found, Mapping):
        raise DataError(f"{path}: holds {_names(tree)}, not fid with mu and sigma; pass EDM2's reference of the data")
    return found


def _checked(found: Mapping[str, Any], path: Path) -> Statistics:
    if not {"mu", "sigma"} <= found.keys():
        raise DataError(f"{path}: holds {_names(found)}, not mu and sigma; pass statistics, not samples")
    mean, cov = found["mu"], found["sigma"]
    for key, array in (("mu", mean), ("sigma", cov)):
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            raise DataError(f"{path}: {key} is no array of numbers; fetch it again")
    if mean.ndim != 1 or cov.shape != (mean.size, mean.size) or not mean.size:
        raise DataError(f"{path}: mu has shape {mean.shape} and sigma {cov.shape}, not (D,) and (D, D); fetch it again")
    mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    for key, array in (("mu", mean), ("sigma", cov)):
        if not np.isfinite(array).all():
            raise DataError(f"{path}: {key} has values that are not finite; fetch it again")
    if np.abs(cov - cov.T).max() > 1e-3 * np.abs(cov).max():
        raise DataError(f"{path}: sigma is not symmetric, so it is no covariance; fetch it again")
    return Statistics(mean, cov)


def _names(found: Mapping[str, Any]) -> str:
    return ", ".join(map(str, found)) or "nothing"
