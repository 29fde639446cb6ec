"""Numbered random numbers: that they are random, by scipy's tests, and that each row has its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmf_fast import Guidance, MeanFlowLoss, TimeSampler
from mmf_fast.objective import BatchShare
from mmf_fast.objective.streams import NumberedStream


def stream(
    seed: int, step: int, first: int, rows: int, *shape: int, dtype: torch.dtype = torch.float32
) -> NumberedStream:
    return NumberedStream(seed, step, first, rows, dtype=dtype, shape=shape)


def test_they_are_normal_and_uniform() -> None:
    x = stream(1, 2, 0, 400, 500).noise().numpy().ravel()
    assert stats.kstest(x, "norm").pvalue > 1e-3
    many = stream(1, 2, 0, 50_000)
    for u in (many.uniform().numpy(), many.uniform().numpy()):
        assert stats.kstest(u, "uniform").pvalue > 1e-3
        assert u.min() >= 0 and u.max() <= 1
    assert stats.kstest(many.normal().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tails_are_those_of_a_normal(dtype: torch.dtype) -> None:
    """Of four million numbers, how many lie beyond 1, 2, ... 5 deviations on either side; none is infinite."""
    x = stream(4, 0, 0, 400, 10_000, dtype=dtype).noise()
    assert torch.isfinite(x).all()
    for bound in range(1, 6):
        expected = 4e6 * math.erfc(bound / math.sqrt(2)) / 2
        for count in ((x > bound).sum(), (x < -bound).sum()):
            assert abs(int(count) - expected) < 5 * math.sqrt(expected) + 3


@pytest.mark.parametrize("neighbour", ["row", "place", "step", "seed", "column"])
def test_neighbours_have_nothing_in_common(neighbour: str) -> None:
    """Correlations of numbers, of their squares, of products with a third; each has a deviation of 1/sqrt(n)."""
    rows, places = 2000, 64
    x = stream(3, 7, 0, rows, places, dtype=torch.float64).noise()
    other = {
        "row": x.roll(1, 0),
        "place": x.roll(1, 1),
        "step": stream(3, 8, 0, rows, places, dtype=torch.float64).noise(),
        "seed": stream(2, 7, 0, rows, places, dtype=torch.float64).noise(),
        "column": stream(3, 7, 0, rows, dtype=torch.float64).normal()[:, None].expand(rows, places),
    }[neighbour]
    bound = 5 / (rows * places) ** 0.5 * (8 if neighbour == "column" else 1)  # of rows numbers only
    assert abs(float((x * other).mean())) < bound
    assert abs(float(((x**2 - 1) * (other**2 - 1)).mean())) < 2 * bound
    assert abs(float((x * other * x.roll(3, 1)).mean())) < bound
    assert not (x == other).any()


@pytest.mark.parametrize("bit", [0, 1, 7, 20])
def test_a_bit_of_the_row_or_the_step_changes_every_number(bit: int) -> None:
    """Half of the 16 leading bits of each number, by a chi-squared test of how many."""

    def leading(step: int, first: int) -> np.ndarray:
        u = torch.special.ndtr(stream(0, step, first, 1, 20_000, dtype=torch.float64).noise()[0])
        return (u * 2**16).long().numpy()

    expected = 20_000 * stats.binom.pmf(range(17), 16, 0.5)
    for changed in (leading(0, 1 << bit), leading(1 << bit, 0)):
        counts = np.bincount(np.bitwise_count(leading(0, 0) ^ changed), minlength=17)
        both = [np.append(each[2:15], each[:2].sum() + each[15:].sum()) for each in (counts, expected)]
        assert stats.chisquare(*both).pvalue > 1e-3


def test_bits_are_fair_over_rows_and_places() -> None:
    """A chi-squared test of 256 classes over rows at one place, and over places of one row; of pairs, too."""
    places = torch.special.ndtr(stream(0, 0, 9, 1, 50_000).noise()[0].double())
    for u in (stream(0, 0, 0, 50_000).uniform().double(), places):
        classes = (u * 256).long().clamp(max=255)
        pairs = classes[0::2] // 16 * 16 + classes[1::2] // 16
        for found in (classes, pairs):
            assert stats.chisquare(np.bincount(found.numpy(), minlength=256)).pvalue > 1e-3


def test_a_row_has_the_same_numbers_whoever_draws_it() -> None:
    whole, part = stream(5, 6, 0, 30, 3, 5), stream(5, 6, 12, 7, 3, 5)
    for draw in (NumberedStream.uniform, NumberedStream.noise, NumberedStream.normal):
        assert torch.equal(draw(whole)[12:19], draw(part))
    assert stream(5, 6, 0, 4).noise().shape == (4,)


def test_large_seeds_and_steps() -> None:
    found = {float(stream(seed, step, 0, 1).uniform()) for seed in (0, -1, 2**70) for step in (0, 2**40)}
    assert len(found) == 6


class Launches(TorchDispatchMode):
    """Counts the operations that put a result on the meta device, which stands for a GPU here; views start nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_meta and not function.is_view:
            self.names.append(function.name())
        return result


def test_a_step_starts_few_kernels_for_its_numbers() -> None:
    """Of any number of rows, whatever is drawn."""
    for rows in (1, 300):
        with Launches() as launches:
            made = NumberedStream(1, 2, 0, rows, device="meta", shape=(3, 8, 8))
            made.uniform(), made.normal(), made.normal(), made.noise()
        assert 8 < len(launches.names) <= 16, launches.names


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_a_loss_draws_what_it_needs_from_one_hash(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = NumberedStream.__init__
    monkeypatch.setattr(NumberedStream, "__init__", lambda self, *args: made.append(args) or real(self, *args))

    def net(z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return z

    times = TimeSampler(share=0.5, t=law, r=law)
    loss_fn = MeanFlowLoss(net, times=times, guidance=Guidance(omega=2.0, dropout=0.5), null_label=3)
    loss_fn(torch.randn(6, 2), step=3, part=BatchShare(1, 2, seed=4), y=torch.arange(6) % 3)
    assert len(made) == 1
