"""The maps against the laws they are drawn from, and the pictures against what NumPy makes of whole pixels."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import polar

from mmf_fast.data import load
from mmf_fast.data.augment import transforms, warp

SHAPE = (3, 32, 32)


def pictures(height=8, width=8):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def likely(sample, law):
    return stats.kstest(sample, law).pvalue > 1e-3


def test_every_part_follows_its_law():
    """A = F S^-1 R^-1 A^-1: its determinant tells scale and mirroring, its polar factors rotation and stretch."""
    maps = transforms(seed=0, step=5, size=4000, p=1.0, shape=SHAPE).double().numpy()
    linear, offset = maps[:, :, :2], maps[:, :, 2:]
    determinant = np.linalg.det(linear)
    assert abs((determinant < 0).mean() - 0.5) < 0.03
    assert likely(np.log2(np.abs(determinant)) / -2 / 0.2, "norm")
    linear[:, 1] *= np.sign(determinant)[:, None]
    factors = [polar(matrix) for matrix in linear]
    assert likely(np.array([math.atan2(u[1, 0], u[0, 0]) for u, _ in factors]) / (2 * np.pi) + 0.5, "uniform")
    widths, axes = zip(*(np.linalg.eigh(p) for _, p in factors), strict=True)
    ratio = np.array([width[1] / width[0] for width in widths])
    assert likely(np.log2(ratio) / 2 / 0.2, "halfnorm")
    upright = np.array([np.abs(axis).max() > 1 - 1e-4 for axis in axes])[ratio > 1.05]
    assert abs(upright.mean() - 0.5) < 0.04
    move = -np.linalg.solve(linear, offset * np.stack([np.ones(4000), np.sign(determinant)], 1)[:, :, None])[:, :, 0]
    for direction in move.T:  # a side is 2 long
        assert likely(direction / 2 / 0.125, "norm")


@pytest.mark.parametrize("p", [0.12, 0.5])
def test_each_part_befalls_a_sample_with_its_probability(p):
    maps = transforms(seed=1, step=0, size=20_000, p=p, shape=SHAPE)
    same = (maps == torch.eye(2, 3)).flatten(1).all(1).double().mean()
    assert same == pytest.approx((1 - p / 2) * (1 - p) ** 4, abs=0.012)
    assert (torch.det(maps[:, :, :2]) < 0).double().mean() == pytest.approx(p / 2, abs=0.012)
    assert (maps[:, :, 2] != 0).any(1).double().mean() == pytest.approx(p, abs=0.012)


def test_whole_pixels_move_as_numpy_moves_them():
    x = pictures()
    maps = torch.tensor([[[0.0, -1, 0], [1, 0, 0]], [[1, 0, 0], [0, -1, 0]]])  # by a quarter; top to bottom
    moved = warp(x, maps)
    assert any(torch.allclose(moved[0], x[0].rot90(k, (1, 2)), atol=1e-6) for k in (1, 3))
    torch.testing.assert_close(moved[1], x[1].flip(1), rtol=0, atol=1e-6)

    wide = pictures(6, 10)
    maps = torch.tensor([[[1.0, 0, 2 * 3 / 10], [0, 1, 0]], [[1, 0, 0], [0, 1, -2 * 2 / 6]]])  # by 3 columns, 2 rows
    moved = warp(wide, maps)
    padded = np.pad(wide.numpy(), ((0, 0), (0, 0), (2, 2), (3, 3)), mode="symmetric")
    np.testing.assert_allclose(moved[0], padded[0, :, 2:8, 6:16], atol=1e-5)
    np.testing.assert_allclose(moved[1], padded[1, :, 0:6, 3:13], atol=1e-5)


def test_a_rotation_keeps_lengths_where_images_are_not_square():
    """In pixels: the linear part of a rotated and scaled image is a multiple of an orthogonal matrix."""
    maps = transforms(seed=0, step=0, size=500, p=0.3, shape=(3, 16, 64)).double().numpy()
    half = np.array([32.0, 8.0])
    pixels = maps[:, :, :2] * half[:, None] / half
    gram = pixels.transpose(0, 2, 1) @ pixels
    unstretched = np.isclose(gram[:, 0, 0], gram[:, 1, 1]) & np.isclose(gram[:, 0, 1], 0, atol=1e-6)
    assert unstretched.mean() == pytest.approx(0.7, abs=0.06)


def test_values_stay_in_range_and_the_untouched_stay_as_they_are():
    x = pictures(32, 32).sign()
    maps = transforms(seed=0, step=0, size=2, p=1.0, shape=SHAPE)
    maps[0] = torch.eye(2, 3)
    moved = warp(x, maps)
    assert torch.equal(moved[0], x[0]) and not torch.equal(moved[1], x[1])
    assert moved.abs().max() <= 1
    assert torch.equal(warp(x, torch.eye(2, 3).repeat(2, 1, 1)), x)


def test_a_batch_is_the_same_on_any_number_of_ranks():
    options = {"shape": SHAPE, "count": 64, "num_classes": 3, "flip": True, "seed": 2}
    data, plain = load("synthetic", augment=0.5, **options), load("synthetic", **options)
    x, y = data.batch(3, 24)
    for world_size in (2, 4):
        parts = [data.batch(3, 24, rank, world_size) for rank in range(world_size)]
        for rank, (part, labels) in enumerate(parts):
            own = slice(rank * 24 // world_size, (rank + 1) * 24 // world_size)
            torch.testing.assert_close(part, x[own], rtol=0, atol=1e-5)
            assert torch.equal(labels, y[own])
    assert torch.equal(data.batch(3, 24)[0], x)
    stored = plain.batch(3, 24)[0].numpy().astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert 0 < (torch.from_numpy(stored) == x).flatten(1).all(1).sum() < 24  # some as they were, some not
    assert torch.equal(data.split("train")[0], plain.split("train")[0])


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_a_probability_is_one(p):
    with pytest.raises(ValueError, match=r"data\.augment is .*: it is a probability"):
        load("synthetic", augment=p)
