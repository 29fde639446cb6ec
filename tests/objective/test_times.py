"""The laws of (r, t) against scipy's distributions, and the lambda schedules against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logit

from mmf_fast import LambdaSchedule, TimeSampler
from mmf_fast.objective.streams import GlobalStream


def draw(n: int = 20_000, **options: object) -> tuple[np.ndarray, np.ndarray]:
    torch.manual_seed(0)
    r, t = TimeSampler(**options).draw(GlobalStream(n, dtype=torch.float64))  # type: ignore[arg-type]
    return r.numpy(), t.numpy()


@pytest.mark.parametrize("t", ["uniform", "logit_normal"])
@pytest.mark.parametrize("r", ["uniform", "sorted", "logit_normal", "zero"])
@pytest.mark.parametrize(("batch", "share"), [(8, 0.25), (7, 0.25), (1, 0.25), (5, 0.0), (5, 1.0), (100, 0.33)])
def test_counts_and_ranges(t: str, r: str, batch: int, share: float) -> None:
    sampler = TimeSampler(share=share, t=t, r=r)
    r_, t_ = sampler.draw(GlobalStream(batch))
    assert r_.shape == t_.shape == (batch,) and r_.dtype == torch.float32
    assert bool(((r_ >= 0) & (r_ < t_) & (t_ <= 1)).all())
    found = [sampler.intervals(batch, 0, (k + 0.5) / 100) for k in range(100)]
    assert {math.floor(share * batch), math.ceil(share * batch)} >= set(found)
    assert sum(found) == pytest.approx(100 * share * batch, abs=1)


def test_intervals_begin_at_start() -> None:
    sampler = TimeSampler(share=0.5, start=3)
    assert [sampler.intervals(8, step) for step in range(6)] == [0, 0, 0, 4, 4, 4]
    with pytest.raises(ValueError, match=r"times\.start is -1"):
        TimeSampler(start=-1)


def test_uniform_law() -> None:
    r, t = draw(share=1.0)
    assert stats.kstest(t, "uniform").pvalue > 1e-3
    assert stats.kstest(r / t, "uniform").pvalue > 1e-3


def test_logit_normal_law() -> None:
    _, t = draw(share=0.5, t="logit_normal", t_mean=-0.6, t_std=1.6)
    assert stats.kstest(logit(t), "norm", args=(-0.6, 1.6)).pvalue > 1e-3


def test_sorted_law_is_that_of_minimum_and_maximum() -> None:
    r, t = draw(share=1.0, t="logit_normal", r="sorted")
    assert stats.kstest(logit(t), lambda x: stats.norm.cdf(x, -0.4, 1.0) ** 2).pvalue > 1e-3
    assert stats.kstest(logit(r), lambda x: 1 - (1 - stats.norm.cdf(x, -0.4, 1.0)) ** 2).pvalue > 1e-3


def test_separate_logit_normals() -> None:
    options = dict(t="logit_normal", t_mean=-0.6, t_std=1.6, r="logit_normal", r_mean=-4.0, r_std=1.6)
    r, t = draw(share=1.0, **options)
    larger = lambda x: stats.norm.cdf(x, -0.6, 1.6) * stats.norm.cdf(x, -4.0, 1.6)  # noqa: E731
    assert stats.kstest(logit(t), larger).pvalue > 1e-3
    assert (r < t).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": -0.1}, r"\[0, 1\]"),
        ({"share": 1.5}, r"\[0, 1\]"),
        ({"t": "normal"}, "uniform, logit_normal"),
        ({"r": "t"}, "sorted"),
        ({"t_std": -1.0}, "negative"),
    ],
)
def test_time_errors(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        TimeSampler(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LambdaSchedule(value=0.3), {0: 0.3, 10**6: 0.3}),
        (LambdaSchedule(kind="linear", warmup=100), {0: 0.0, 25: 0.25, 100: 1.0, 500: 1.0}),
        (LambdaSchedule(kind="linear", start=50, warmup=100, value=0.5), {0: 0.0, 50: 0.0, 100: 0.25, 150: 0.5}),
        (LambdaSchedule(kind="cosine", warmup=100), {0: 0.0, 25: (1 - math.cos(math.pi / 4)) / 2, 50: 0.5, 200: 1.0}),
        (LambdaSchedule(kind="step", start=10, value=0.7), {0: 0.0, 9: 0.0, 10: 0.7}),
        (LambdaSchedule(kind="piecewise", points=((10, 0.2), (20, 1.0), (40, 0.5))),
         {0: 0.2, 10: 0.2, 15: 0.6, 20: 1.0, 30: 0.75, 99: 0.5}),
    ],
)  # fmt: skip
def test_schedules(schedule: LambdaSchedule, expected: dict[int, float]) -> None:
    for step, lam in expected.items():
        assert schedule(step) == pytest.approx(lam, abs=1e-12)
    assert max(expected.values()) <= schedule.maximum <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "quadratic"}, "constant, linear"),
        ({"value": 1.5}, r"\[0, 1\]"),
        ({"kind": "linear"}, "warmup"),
        ({"kind": "piecewise"}, "points"),
        ({"kind": "piecewise", "points": ((5, 0.1), (5, 0.2))}, "rise"),
        ({"kind": "piecewise", "points": ((5, 2.0),)}, r"\[0, 1\]"),
    ],
)
def test_schedule_errors(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        LambdaSchedule(**options)
    assert "\n" not in str(error.value)
