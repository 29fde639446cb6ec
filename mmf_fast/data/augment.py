"""Geometric augmentation of images, with which EDM trains on CIFAR-10 (arXiv 2206.00364, appendix F.2).

Each of these is applied to a sample with probability p, independently of the others, in this order (n: standard
normal):

    mirrored top to bottom   in half of the cases
    scaled                   by 2^(0.2 n)
    rotated                  by an angle uniform on the circle
    stretched                by 2^(0.2 n) along one axis and by its inverse along the other; in half of the cases along
                             axes at an angle uniform on the circle
    moved                    by 0.125 n of the width and 0.125 n of the height

Left and right are another option (flip). Beyond its border an image goes on as its reflection. Values in between are
bicubic; EDM filters with wavelets at twice the resolution.

EDM tells its network what befell a sample, and draws samples to which nothing has. The networks here are not told: what
they learn is the augmented distribution, so that samples show rotations as often as p says.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["check_probability", "transforms", "warp"]

_TRANSFORMS = 4  # last word of the random key, see dataset.coins


def transforms(seed: int, step: int, size: int, p: float, shape: tuple[int, ...]) -> Tensor:
    """(size, 2, 3) float32, one map for each row of the global batch, whichever rank it belongs to: from a place in the
    result to the place in the image (C, H, W) it is taken from, both in [-1, 1], as F.affine_grid takes it.
    """
    rng = np.random.default_rng([seed, step, _TRANSFORMS])

    def chosen(values: np.ndarray) -> np.ndarray:
        return np.where(rng.random(size) < p, values, 0)

    mirrored = chosen(rng.integers(2, size=size))
    scale = np.exp2(0.2 * chosen(rng.standard_normal(size)))
    angle = chosen(rng.uniform(-np.pi, np.pi, size))
    stretch = np.exp2(0.2 * chosen(rng.standard_normal(size)))
    turned = (rng.random(size) < 0.5) & (stretch != 1)
    axis = np.where(turned, rng.uniform(-np.pi, np.pi, size), 0)
    move = 0.125 * chosen(rng.standard_normal((2, size)))

    # Coordinates are pixels from the middle. result = T A R S F image, so image = F S^-1 R^-1 A^-1 T^-1 result.
    half = np.array(shape[:0:-1]) / 2  # of width and height
    stretched = _rotation(axis) @ _diagonal(1 / stretch, stretch) @ _rotation(-axis)
    linear = _diagonal(1 / scale, (1 - 2 * mirrored) / scale) @ _rotation(-angle) @ stretched
    offset = -linear @ (2 * half * move.T)[:, :, None]
    maps = np.concatenate([linear * half / half[:, None], offset / half[:, None]], axis=2)
    return torch.from_numpy(maps.astype(np.float32))


def warp(x: Tensor, maps: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1], each under its map (B, 2, 3); one whose map is the identity is left alone."""
    changed = (maps != torch.eye(2, 3)).flatten(1).any(1)
    if not changed.any():
        return x
    moved = x[changed]
    grid = F.affine_grid(maps[changed], list(moved.shape), align_corners=False)
    moved = F.grid_sample(moved, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return x.index_copy(0, changed.nonzero()[:, 0], moved.clamp_(-1, 1))


def check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"data.augment is {p}: it is a probability, 0 for none (EDM: 0.12)")


def _rotation(angle: np.ndarray) -> np.ndarray:
    """(n,) -> (n, 2, 2)"""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def _diagonal(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n,), (n,) -> (n, 2, 2)"""
    return np.stack([x, y], -1)[:, None, :] * np.eye(2)
