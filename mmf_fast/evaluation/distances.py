"""Two sets of samples compared, in float64: sliced Wasserstein, Frechet, nearest neighbour, precision and recall."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["frechet_distance", "gaussian_frechet", "nearest", "precision_recall", "sliced_wasserstein"]

CANDIDATES = 8  # rows that `nearest` compares exactly
CHUNK = 256  # rows that it and `precision_recall` take at a time


def sliced_wasserstein(x: Tensor, y: Tensor, p: float = 2, projections: int = 256, seed: int = 0) -> float:
    """The sliced p-Wasserstein distance of two point sets (Bonneel et al., J. Math. Imaging Vis. 51, 2015)

        SW_p(x, y) = ( mean_k W_p(<x, theta_k>, <y, theta_k>)^p )^(1/p),    theta_k uniform on the unit sphere

    x (N, D), y (M, D): any sizes; one row is one sample, further axes are flattened.
    p: at least 1.  projections: number of directions theta_k.  seed: of the directions, the same for equal D.

    W_p between two sets of numbers is exact, from their sorted values. Two draws of the same law do not have distance 0
    but a floor of order N^(-1/2): quote the distance of two data sets of the same sizes beside it.
    Raises ValueError for different D, an empty set, values that are not finite, p or projections below 1.
    """
    a, b = _matrix(x), _matrix(y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"samples of dimension {a.shape[1]} and {b.shape[1]} cannot be compared")
    if p < 1 or projections < 1:
        raise ValueError(f"p is {p} and projections is {projections}: both must be at least 1")
    directions = np.random.default_rng(seed).standard_normal((a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    return float(np.mean(wasserstein_1d(a @ directions, b @ directions, p)) ** (1 / p))


def wasserstein_1d(a: np.ndarray, b: np.ndarray, p: float) -> np.ndarray:
    """W_p^p between column k of a (N, K) and of b (M, K): the integral over q in [0, 1] of |F_a^-1(q) - F_b^-1(q)|^p.

    Both quantile functions are steps, with jumps at the multiples of 1/N and 1/M.
    """
    a, b = np.sort(a, axis=0), np.sort(b, axis=0)
    n, m = len(a), len(b)
    if n == m:
        return np.mean(np.abs(a - b) ** p, axis=0)
    edges = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)  # in units of 1 / (N M), so that they are exact
    width = np.diff(edges) / (n * m)
    return width @ np.abs(a[edges[:-1] // m] - b[edges[:-1] // n]) ** p


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """The Frechet distance (a squared length) of the Gaussians fitted to two sets of features x (N, D) and y (M, D).

    Its estimate falls as sets grow: compare only figures of sets of equal sizes.
    Raises ValueError for different D, fewer than 2 rows, values that are not finite.
    """
    a, b = _matrix(x), _matrix(y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of dimension {a.shape[1]} and {b.shape[1]} cannot be compared")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, given {len(a)} and {len(b)}")
    covariances = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b))
    return gaussian_frechet(a.mean(axis=0), b.mean(axis=0), *covariances)


def gaussian_frechet(mean_a: ArrayLike, mean_b: ArrayLike, cov_a: ArrayLike, cov_b: ArrayLike) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson and Landau, J. Multivar. Anal. 12, 1982)

        |m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2))

    The last trace is the sum of the singular values of A^(1/2) B^(1/2): unlike a matrix square root of A B it is exact
    for singular covariances too.
    """
    shift = np.asarray(mean_a, dtype=np.float64) - np.asarray(mean_b, dtype=np.float64)
    a, b = np.asarray(cov_a, dtype=np.float64), np.asarray(cov_b, dtype=np.float64)
    overlap = np.linalg.svd(_square_root(a) @ _square_root(b), compute_uv=False).sum()
    return max(0.0, float(shift @ shift + np.trace(a) + np.trace(b) - 2 * overlap))


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of x the Euclidean distance (N,) float64 to the nearest row of y, and the index (N,) of that row.

    Squared distances come from one matrix product, |x|^2 - 2 x y + |y|^2, in float32. That is fast, but loses digits
    where two rows are close; so the CANDIDATES nearest rows are then compared exactly, in float64.
    Raises ValueError for different dimensions, an empty set, values that are not finite.
    """
    a, b = (torch.from_numpy(_matrix(rows)) for rows in (x, y))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"samples of dimension {a.shape[1]} and {b.shape[1]} cannot be compared")
    centre = b.mean(0)
    rough_a, rough_b = (a - centre).float(), (b - centre).float()
    half_square = rough_b.square().sum(1) / 2
    count = min(CANDIDATES, len(b))
    distances, indices = [], []
    for rows, rough in zip(a.split(CHUNK), rough_a.split(CHUNK), strict=True):
        candidates = torch.addmm(half_square, rough, rough_b.T, alpha=-1).topk(count, largest=False).indices
        exact = (b[candidates] - rows[:, None]).norm(dim=2)
        distance, place = exact.min(dim=1)
        distances.append(distance)
        indices.append(candidates.gather(1, place[:, None])[:, 0])
    return torch.cat(distances), torch.cat(indices)


def precision_recall(x: Tensor, y: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of samples x (N, D) of the law of y (M, D) (Kynkaanniemi et al., arXiv 1904.06991, eq. 1, 2)

        precision = share of the rows of x in the support of y,   recall = share of the rows of y in the support of x

    where the support of a set is the union of balls about its rows, each as large as the distance to the k-th nearest
    other row. Low precision means bad samples, low recall means that kinds of samples are missing. Both depend on the
    sizes of the sets: compare only figures of sets of equal sizes.
    Raises ValueError for different D, k below 1 or not below both sizes, values that are not finite.
    """
    a, b = (torch.from_numpy(_matrix(rows)) for rows in (x, y))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of dimension {a.shape[1]} and {b.shape[1]} cannot be compared")
    if not 1 <= k < min(len(a), len(b)):
        raise ValueError(f"k is {k}: it must lie between 1 and {min(len(a), len(b)) - 1}, the smaller set without one")
    return _share_within(a, b, k), _share_within(b, a, k)


def _share_within(a: Tensor, b: Tensor, k: int) -> float:
    """The share of the rows of a in a ball about a row of b that reaches to its k-th nearest other row."""
    radius = torch.cat([torch.cdist(rows, b).kthvalue(k + 1, dim=1).values for rows in b.split(CHUNK)])
    within = [(torch.cdist(rows, b) <= radius).any(dim=1) for rows in a.split(CHUNK)]
    return float(torch.cat(within).double().mean())


def _square_root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root; eigenvalues that rounding made negative are zero."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _matrix(x: Tensor) -> np.ndarray:
    """(N, ...) -> (N, D) float64."""
    rows = x.detach().to("cpu", torch.float64).reshape(len(x), -1).numpy() if len(x) else np.empty((0, 1))
    if not rows.size:
        raise ValueError("an empty set of samples has no distance to another")
    if not np.isfinite(rows).all():
        raise ValueError("some samples are not finite: the training has diverged, or the steps are too few")
    return rows
