"""Data and metric of the study of C2OT, against closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from studies import c2ot


def test_the_source_is_eight_gaussians_of_covariance_root_of_a_tenth():
    points = c2ot.eight_gaussians(np.random.default_rng(0), 80_000)
    angle = np.arctan2(points[:, 1], points[:, 0])
    nearest = np.round(angle / (math.pi / 4)) * (math.pi / 4)
    away = points - 5 * np.stack([np.cos(nearest), np.sin(nearest)], axis=1)
    # those beyond the border to the next Gaussian, 1.91 away or 3.4 deviations, are too few to show
    assert away.var() == pytest.approx(math.sqrt(0.1), rel=0.02)
    assert np.bincount((np.round(angle / (math.pi / 4)) % 8).astype(int)) == pytest.approx(10_000, rel=0.05)


def test_moons_are_half_circles_shifted_along_the_diagonal():
    points = (c2ot.moons(np.random.default_rng(0), 1000) + 1) / 3
    for half, centre, sign in ((points[:500], (0, 0), 1), (points[500:], (1, 0.5), -1)):
        angle = math.pi * np.arange(500) / 499
        shift = half - np.array(centre) - sign * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        np.testing.assert_allclose(shift[:, 0], shift[:, 1], atol=1e-6)
        assert shift.min() > -1e-6 and 0.19 < shift.max() < 0.2 + 1e-6


def test_the_wasserstein_distance_is_the_best_of_all_assignments():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 6, 2))
    every = [np.square(x - y[list(order)]).sum(1).mean() for order in itertools.permutations(range(6))]
    assert c2ot.squared_wasserstein(x, y) == pytest.approx(min(every), rel=1e-9)
    assert c2ot.squared_wasserstein(x, x + (3, 4)) == pytest.approx(25, rel=1e-9)


def test_four_batches_are_a_pool_of_moons_in_turn():
    data = c2ot.EightGaussiansToMoons(seed=3)
    x, cond = zip(*[data.batch(step, 256) for step in range(4, 8)], strict=True)
    source = torch.cat([each["noise"] for each in cond])
    assert torch.cat(x).shape == source.shape == (1024, 2)
    upper, lower = ((torch.cat(x)[rows, 1] + 1) / 3 for rows in (slice(512), slice(512, 1024)))
    assert (upper > -1e-6).all() and (lower < 0.7 + 1e-6).all()  # a half circle above and one below, shifted up to 0.2
    assert source.norm(dim=1).min() > 2 and not source[:256].equal(source[256:512])
    again, other = data.batch(6, 256), c2ot.EightGaussiansToMoons(seed=4).batch(6, 256)
    assert again[0].equal(x[2]) and again[1]["noise"].equal(cond[2]["noise"])
    assert not other[1]["noise"].equal(cond[2]["noise"])


class Turning(nn.Module):
    """v = d/dt z of a rotation by t."""

    def forward(self, z, r, t):
        return torch.stack([-z[:, 1], z[:, 0]], dim=1)


def test_the_adaptive_solver_follows_a_rotation():
    z = torch.randn(300, 2)
    found, evaluations = c2ot.adaptive(Turning(), z)
    back = torch.tensor([[math.cos(1), math.sin(1)], [-math.sin(1), math.cos(1)]])
    torch.testing.assert_close(found, z @ back.T, rtol=0, atol=1e-2)
    assert 6 < evaluations < 100


def test_flow_matching_sees_the_published_network():
    """With r = t the second time is 0: two linear maps, three residual blocks, a linear map."""
    torch.manual_seed(0)
    net, z, t = c2ot.ResidualMLP(), torch.randn(5, 2), torch.rand(5)
    x = net.point(z) + t[:, None] * net.times.weight[:, 0] + net.times.bias
    for block in net.blocks:
        x = x + block[2](nn.functional.gelu(block[0](x)))
    torch.testing.assert_close(net(z, t, t), net.output(x))
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters - 128 == 2 * 128 + 128 + 2 * 128 + 3 * (128 * 512 + 512 + 512 * 128 + 128) + 2 * 128 + 2
