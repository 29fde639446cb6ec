"""Gaussian mixtures: data whose velocity v(z, t) is known in closed form, and u(z, r, t) by integrating it.

    x ~ sum_k pi_k N(mu_k, diag(s^2)),  z_t = (1 - t) x + t eps,  sigma_t^2 = (1 - t)^2 s^2 + t^2
    v(z, t) = E[eps - x | z] = sum_k gamma_k(z) [ (t - (1 - t) s^2) / sigma_t^2 (z - (1 - t) mu_k) - mu_k ]

with gamma_k the probability of component k given z, softmax_k(log pi_k - |(z - (1 - t) mu_k) / sigma_t|^2 / 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmf_fast.data.dataset import Batch, Identity, Split, SplitName, rank_part

__all__ = ["Mixture", "one_step_error", "three_gaussians"]


class Mixture:
    """A dataset (`mmf_fast.data.Dataset`) of points (D,) from Gaussians that differ in their means, without labels.

    means: (K, D).  weights: (K,), which add up to 1.  deviation: s, (D,), all positive.
    count: draw batches from so many fixed points; None: afresh.  seed: of the batches; the fixed points do not depend
        on it.
    """

    num_classes = 0
    identity: Identity = {}
    shape: tuple[int, ...]

    def __init__(
        self, means: Tensor, weights: Sequence[float], deviation: Tensor, seed: int = 0, count: int | None = None
    ) -> None:
        self.name, self.seed, self.shape = "mixture", seed, (means.shape[1],)
        self.means, self.weights, self.deviation = means.double(), torch.tensor(weights).double(), deviation.double()
        self.points = None if count is None else self._draw(np.random.default_rng(0), count)

    def batch(self, step: int, size: int, rank: int = 0, world_size: int = 1) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        x = self._draw(rng, size) if self.points is None else self.points[rng.integers(len(self.points), size=size)]
        return x[rank_part(step, size, rank, world_size)].float(), None

    def split(self, name: SplitName) -> Split:
        return self._draw(np.random.default_rng(1 if name == "train" else 2), 10_000).float(), None

    def _draw(self, rng: np.random.Generator, count: int) -> Tensor:
        component = rng.choice(len(self.weights), count, p=self.weights.numpy() / float(self.weights.sum()))
        return self.means[component] + self.deviation * torch.from_numpy(rng.standard_normal((count, *self.shape)))

    def velocity(self, z: Tensor, t: Tensor | float) -> Tensor:
        """v(z, t): z (B, D), t a number or (B,) -> (B, D), in the dtype of z."""
        t = torch.as_tensor(t, dtype=z.dtype).expand(len(z))[:, None]
        means, prior, s = self.means.to(z.dtype), self.weights.to(z.dtype).log(), self.deviation.to(z.dtype)
        variance = (1 - t) ** 2 * s**2 + t**2
        away = z[:, None] - (1 - t)[:, None] * means  # (B, K, D)
        gamma = torch.softmax(prior - (away.square() / variance[:, None]).sum(2) / 2, dim=1)
        slope = (t - (1 - t) * s**2) / variance
        return slope * (gamma[:, :, None] * away).sum(1) - gamma @ means

    def flow(self, z: Tensor, t: Tensor | float, r: Tensor | float, steps: int = 200) -> Tensor:
        """X(z, t -> r), where the point z of time t is at time r: dz/dt = v by Runge-Kutta of fourth order. t and r are
        numbers or (B,). In coordinates where all means are 0 it is z sigma_r / sigma_t."""
        t, r = (torch.as_tensor(time, dtype=z.dtype).expand(len(z)) for time in (t, r))
        apart = self.means.ne(0).any(0)
        if not apart.all():
            in_them = Mixture(self.means[:, apart], self.weights.tolist(), self.deviation[apart])
            before, after = (
                ((1 - time[:, None]) ** 2 * self.deviation**2 + time[:, None] ** 2).sqrt() for time in (t, r)
            )
            x = z * (after / before).to(z.dtype)
            x[:, apart] = in_them.flow(z[:, apart], t, r, steps)
            return x
        h = (r - t) / steps
        for i in range(steps):
            now = t + i * h
            k1 = self.velocity(z, now)
            k2 = self.velocity(z + h[:, None] / 2 * k1, now + h / 2)
            k3 = self.velocity(z + h[:, None] / 2 * k2, now + h / 2)
            k4 = self.velocity(z + h[:, None] * k3, now + h)
            z = z + h[:, None] / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return z


def three_gaussians(
    dim: int = 2, outside: float = 0.3, deviation: float = 0.3, seed: int = 0, count: int | None = None
) -> Mixture:
    """Three Gaussians of unequal weight, on an equilateral triangle of radius 1.5 in a plane of R^dim. Their deviation
    is `deviation` in that plane, and `outside` in the other dimensions."""
    angle = torch.tensor([math.pi / 2, math.pi * 7 / 6, math.pi * 11 / 6], dtype=torch.float64)
    means = torch.zeros(3, dim, dtype=torch.float64)
    means[:, :2] = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    deviations = torch.full((dim,), outside)
    deviations[:2] = deviation
    return Mixture(means, (0.5, 0.3, 0.2), deviations, seed, count)


_EXACT: dict[tuple[bytes, ...], tuple[Tensor, Tensor]] = {}  # of each mixture, as it takes seconds


@torch.no_grad()
def one_step_error(
    net: Callable[..., Tensor], data: Mixture, points: int = 1000, coordinates: slice = slice(None)
) -> float:
    """Root mean square, over points and coordinates, of the difference of u(z, 0, 1) from the exact map."""
    key = tuple(each.numpy().tobytes() for each in (data.means, data.weights, data.deviation))
    if key not in _EXACT:
        z = torch.randn(points, *data.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        _EXACT[key] = z, z - data.flow(z, 1.0, 0.0)
    z, exact = _EXACT[key]
    zero, one = torch.zeros(len(z)), torch.ones(len(z))
    return float((net(z.float(), zero, one).double() - exact)[:, coordinates].square().mean().sqrt())
