"""Four distributions in the plane, drawn afresh at every step and standardised by their exact mean and variance.

A toy is a function `points(rng, count) -> (count, 2)` in its natural coordinates, with mean and variance of each
coordinate in closed form. Isotropic noise of standard deviation s adds s^2 to both variances.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mmf_fast.data.dataset import Batch, Identity, Split, SplitName, check_seed, check_split, rank_part

__all__ = ["Toy2D", "checkerboard", "circles", "eight_gaussians", "two_moons"]

SPLIT_SIZE = 10_000
# First word of a random key: the batches have (_BATCH, seed, step), the splits a fixed key that no batch has.
_BATCH, _TRAIN, _VALIDATION = range(3)


class Toy2D:
    """An endless dataset of points (2,), without labels, of zero mean and unit variance per coordinate.

    The splits are two independent draws of SPLIT_SIZE points, the same for every seed, so that runs of different
    seeds are judged by the same points. Raises ValueError for a negative seed.
    """

    num_classes = 0
    shape: tuple[int, ...] = (2,)

    def __init__(
        self,
        name: str,
        points: Callable[[np.random.Generator, int], np.ndarray],
        mean: tuple[float, float],
        variance: tuple[float, float],
        seed: int = 0,
    ) -> None:
        check_seed(seed)
        self.name, self.seed = name, seed
        self.identity: Identity = {}
        self._points, self._mean, self._std = points, np.array(mean), np.sqrt(variance)

    def batch(self, step: int, size: int, rank: int = 0, world_size: int = 1) -> Batch:
        part = rank_part(step, size, rank, world_size)
        return self._draw((_BATCH, self.seed, step), size)[part], None

    def split(self, name: SplitName) -> Split:
        check_split(name)
        return self._draw((_TRAIN if name == "train" else _VALIDATION,), SPLIT_SIZE), None

    def _draw(self, key: tuple[int, ...], count: int) -> Tensor:
        points = self._points(np.random.default_rng(key), count)
        return torch.from_numpy((points - self._mean) / self._std).to(torch.float32)


def two_moons(seed: int = 0, noise: float = 0.05) -> Toy2D:
    """Two interleaving half circles of radius 1: (cos a, sin a) and (1 - cos a, 1/2 - sin a), a uniform on [0, pi].

    noise: standard deviation of the Gaussian noise, before standardising. Raises ValueError where it is negative.
    """
    _check_noise(noise)

    def points(rng: np.random.Generator, count: int) -> np.ndarray:
        angle, lower = rng.uniform(0, math.pi, count), rng.integers(2, size=count)
        x = np.where(lower, 1 - np.cos(angle), np.cos(angle))
        y = np.where(lower, 0.5 - np.sin(angle), np.sin(angle))
        return np.stack((x, y), axis=1) + noise * rng.standard_normal((count, 2))

    return Toy2D("two_moons", points, (0.5, 0.25), (0.75 + noise**2, 0.5625 - 1 / math.pi + noise**2), seed)


def circles(seed: int = 0, noise: float = 0.05, factor: float = 0.5) -> Toy2D:
    """Two concentric circles, of radius 1 and `factor`, equally likely.

    noise: as for two moons. factor: in (0, 1). Raises ValueError outside these ranges.
    """
    _check_noise(noise)
    if not 0 < factor < 1:
        raise ValueError(f"circles: factor is {factor}: the inner radius must lie between 0 and 1")

    def points(rng: np.random.Generator, count: int) -> np.ndarray:
        angle, radius = rng.uniform(0, 2 * math.pi, count), np.where(rng.integers(2, size=count), 1.0, factor)
        on_circle = radius[:, None] * np.stack((np.cos(angle), np.sin(angle)), axis=1)
        return on_circle + noise * rng.standard_normal((count, 2))

    variance = (1 + factor**2) / 4 + noise**2
    return Toy2D("circles", points, (0.0, 0.0), (variance, variance), seed)


def checkerboard(seed: int = 0) -> Toy2D:
    """Uniform on the eight dark squares of a 4 x 4 board on [-2, 2]^2: squares with corners (i, j), i + j even."""

    def points(rng: np.random.Generator, count: int) -> np.ndarray:
        column, pair = rng.integers(-2, 2, count), rng.integers(2, size=count)
        row = 2 * pair - 2 + column % 2
        return np.stack((column, row), axis=1) + rng.uniform(size=(count, 2))

    return Toy2D("checkerboard", points, (0.0, 0.0), (4 / 3, 4 / 3), seed)


def eight_gaussians(seed: int = 0, noise: float = 0.1) -> Toy2D:
    """Eight Gaussians on the circle of radius 1, at multiples of 45 degrees, equally likely.

    noise: standard deviation of each, before standardising. Raises ValueError where it is negative.
    """
    _check_noise(noise)

    def points(rng: np.random.Generator, count: int) -> np.ndarray:
        angle = rng.integers(8, size=count) * (math.pi / 4)
        return np.stack((np.cos(angle), np.sin(angle)), axis=1) + noise * rng.standard_normal((count, 2))

    return Toy2D("eight_gaussians", points, (0.0, 0.0), (0.5 + noise**2, 0.5 + noise**2), seed)


def _check_noise(noise: float) -> None:
    if not noise >= 0:
        raise ValueError(f"noise is {noise}: a standard deviation must not be negative")
