import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from sklearn.datasets import make_circles, make_moons

from mmf_fast.data import load
from mmf_fast.evaluation.distances import sliced_wasserstein

TOYS = ("two_moons", "circles", "checkerboard", "eight_gaussians")


@pytest.mark.parametrize("name", TOYS)
def test_standardised(name):
    x, y = load(name).batch(step=0, size=200_000)
    assert (x.shape, x.dtype, y) == ((200_000, 2), torch.float32, None)
    # standard errors are below 1 / sqrt(n) = 0.0022 for both moments
    torch.testing.assert_close(x.mean(0), torch.zeros(2), atol=0.01, rtol=0)
    torch.testing.assert_close(x.var(0), torch.ones(2), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("two_moons", lambda n: make_moons(n, noise=0.05, random_state=1)[0]),
        ("circles", lambda n: make_circles(n, noise=0.05, factor=0.5, random_state=1)[0]),
    ],
)
def test_the_law_is_scikit_learns(name, reference):
    theirs = reference(20_000)
    theirs = torch.from_numpy((theirs - theirs.mean(0)) / theirs.std(0))
    ours, _ = load(name).batch(step=3, size=20_000)
    assert sliced_wasserstein(ours, theirs) < 0.035  # two draws of this size are about 0.015 apart
    assert sliced_wasserstein(ours * 1.1, theirs) > 0.05  # and this would be seen


def test_checkerboard_is_uniform_on_dark_squares():
    x, _ = load("checkerboard").batch(step=0, size=40_000)
    cells = np.floor(x.double().numpy() * math.sqrt(4 / 3)).astype(int)
    assert ((cells >= -2) & (cells < 2)).all()
    assert (cells.sum(axis=1) % 2 == 0).all()
    _, counts = np.unique(cells, axis=0, return_counts=True)
    assert len(counts) == 8
    assert chisquare(counts).pvalue > 1e-3


def test_eight_gaussians_have_equal_shares_and_the_given_width():
    x, _ = load("eight_gaussians", noise=0.1).batch(step=0, size=40_000)
    x = x.double() * math.sqrt(0.5 + 0.01)
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    centres = torch.stack((angles.cos(), angles.sin()), dim=1)
    distance, nearest = torch.cdist(x, centres).min(dim=1)
    assert chisquare(nearest.bincount(minlength=8).numpy()).pvalue > 1e-3
    # the squared distance to the own centre has mean 2 s^2; nearly every point is nearest to its own
    assert distance.square().mean().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("name", TOYS)
def test_batches_are_a_pure_function_of_seed_and_step(name):
    one, other = load(name, seed=3), load(name, seed=3)
    other.batch(0, 32), other.batch(9, 7)  # what was asked before does not matter
    torch.testing.assert_close(one.batch(5, 32)[0], other.batch(5, 32)[0], atol=0, rtol=0)
    drawn = [one.batch(5, 32), one.batch(6, 32), load(name, seed=4).batch(5, 32), load(name, seed=5).batch(3, 32)]
    assert len({x.numpy().tobytes() for x, _ in drawn}) == 4


@pytest.mark.parametrize("name", TOYS)
def test_splits_are_fixed_and_independent(name):
    train, validation = load(name).split("train")[0], load(name).split("validation")[0]
    assert torch.equal(train, load(name, seed=7).split("train")[0])
    assert not set(map(tuple, train.tolist())) & set(map(tuple, validation.tolist()))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("two_moons", {"noise": -0.1}, "noise is -0.1"),
        ("two_moons", {"noise": math.nan}, "noise is nan"),
        ("circles", {"factor": 1.0}, "factor is 1.0"),
        ("checkerboard", {"seed": -1}, "seed is -1"),
    ],
)
def test_refused_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        load(name, **options)


@pytest.mark.parametrize(("step", "size", "message"), [(-1, 8, "step is -1"), (0, 0, "batch size is 0")])
def test_refused_batches(step, size, message):
    with pytest.raises(ValueError, match=message):
        load("two_moons").batch(step, size)
