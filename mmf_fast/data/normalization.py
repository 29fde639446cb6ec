"""Latents of any autoencoder at mean 0 and standard deviation 1 in each channel, and back to what it decodes.

    x = (z - mean) / std,   z = x std + mean        z: the latent as it is stored

mean and std come from the format where it states them, else from the latents, measured while they are written.
Of one that is stored as the mean m and deviation s of its distribution, E z = E m and Var z = Var m + E s^2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Normalization", "Running", "contradiction"]

_AGREES = 1.25  # one factor cannot fit every channel and every set, so a stated scale may be wrong by this factor


class Running:
    """Sums over latents (C channels, or C means and C deviations; in one or two views) for mean and std by channel."""

    def __init__(self, moments: bool, views: int, state: dict[str, Any] | None = None) -> None:
        self.moments, self.views = moments, views
        self.count = 0 if state is None else state["count"]
        self.total = np.zeros(1) if state is None else np.array(state["total"])
        self.squares = np.zeros(1) if state is None else np.array(state["squares"])

    def add(self, sample: np.ndarray) -> None:
        for view in np.split(sample.astype(np.float64), self.views):
            mean, std = np.split(view, 2) if self.moments else (view, np.zeros(1))
            self.total = self.total + mean.sum((1, 2))
            self.squares = self.squares + (mean**2 + std**2).sum((1, 2))
            self.count += mean[0].size

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "total": self.total.tolist(), "squares": self.squares.tolist()}

    def result(self) -> dict[str, list[float]]:
        """mean and std, each of C numbers; a channel that never changes counts as one of std 1, and is only shifted."""
        mean = self.total / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        return {"mean": mean.tolist(), "std": np.where(std > 1e-6 * (1 + np.abs(mean)), std, 1).tolist()}


class Normalization(NamedTuple):
    """mean, std: of each channel of the stored latents.  scaled_by: what the autoencoder's were multiplied by."""

    mean: list[float]
    std: list[float]
    scaled_by: float = 1.0

    def apply(self, z: np.ndarray) -> np.ndarray:
        """z (n, C, h, w) float32, overwritten -> x."""
        z -= np.array(self.mean, np.float32)[:, None, None]
        z /= np.array(self.std, np.float32)[:, None, None]
        return z

    def undo(self, x: Tensor) -> Tensor:
        """x (n, C, h, w), as a network draws it -> what the autoencoder decodes."""
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return (x * std + mean) / self.scaled_by


def contradiction(stated: dict[str, Any], measured: dict[str, Any] | None) -> str | None:
    """A sentence for the user, if normalising as stated does not bring the latents to unit variance; else None."""
    if measured is None:
        return None
    mean, std, shift, scale = (np.array(d[k]) for d in (measured, stated) for k in ("mean", "std"))
    size = float(np.sqrt(np.mean((std**2 + (mean - shift) ** 2) / scale**2)))
    if 1 / _AGREES <= size <= _AGREES:
        return None
    return (
        f"normalised so, latents have a root mean square of {size:.3g} and not of about 1; "
        f"measured std {_short(std)}, mean {_short(mean)}"
    )


def _short(values: np.ndarray) -> str:
    return " ".join(f"{value:.3g}" for value in values[:4]) + " ..." * (len(values) > 4)
