"""Numbered random numbers: that they are random, by scipy's tests, and that each row has its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from mmf_fast.objective.streams import NumberedStream


def test_they_are_normal_and_uniform() -> None:
    stream = NumberedStream(1, 2, 0, 400)
    x = stream.normal((500,)).numpy().ravel()
    assert stats.kstest(x, "norm").pvalue > 1e-3
    u = np.concatenate([stream.uniform().numpy() for _ in range(100)])
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert u.min() >= 0 and u.max() <= 1 and abs(x).max() > 4  # of 200,000


@pytest.mark.parametrize("neighbour", ["row", "place", "step", "seed", "draw"])
def test_neighbours_have_nothing_in_common(neighbour: str) -> None:
    """Correlations of numbers, of their squares, of products with a third; each has a deviation of 1/sqrt(n)."""
    rows, places = 2000, 64
    stream = NumberedStream(3, 7, 0, rows, dtype=torch.float64)
    x = stream.normal((places,))
    other = {
        "row": x.roll(1, 0),
        "place": x.roll(1, 1),
        "step": NumberedStream(3, 8, 0, rows, dtype=torch.float64).normal((places,)),
        "seed": NumberedStream(2, 7, 0, rows, dtype=torch.float64).normal((places,)),
        "draw": stream.normal((places,)),
    }[neighbour]
    bound = 5 / (rows * places) ** 0.5
    assert abs(float((x * other).mean())) < bound
    assert abs(float(((x**2 - 1) * (other**2 - 1)).mean())) < 2 * bound
    assert abs(float((x * other * x.roll(3, 1)).mean())) < bound
    assert not (x == other).any()


def test_bits_are_fair_over_rows_and_places() -> None:
    """A chi-squared test of 256 classes over rows at one place, and over places of one row."""
    for u in (NumberedStream(0, 0, 0, 50_000).uniform(), NumberedStream(0, 0, 9, 1).normal((50_000,))[0]):
        u = u if u.min() >= 0 else torch.special.ndtr(u.double())
        counts = np.bincount((u.double() * 256).long().clamp(max=255).numpy(), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-3


def test_a_row_has_the_same_numbers_whoever_draws_it() -> None:
    whole, part = NumberedStream(5, 6, 0, 30), NumberedStream(5, 6, 12, 7)
    for draw in (NumberedStream.uniform, lambda s: s.normal((3, 5)), NumberedStream.normal):
        assert torch.equal(draw(whole)[12:19], draw(part))
    assert NumberedStream(5, 6, 0, 4).normal(()).shape == (4,)


def test_large_seeds_and_steps() -> None:
    found = {float(NumberedStream(seed, step, 0, 1).uniform()) for seed in (0, -1, 2**70) for step in (0, 2**40)}
    assert len(found) == 6
