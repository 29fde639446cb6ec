"""What the benchmarks measure with, against cases whose answer is known."""

import os

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import BLOCK, Stopwatch, count_flops, environment, peak_bytes, ratio


def test_a_ratio_does_not_see_a_machine_that_slows_down():
    """Blocks in turn: baseline, run, baseline, ...; the last is six times as slow as the first."""
    blocks = [1 + 0.5 * i for i in range(11)]
    baseline = [s for s in blocks[::2] for _ in range(BLOCK)]
    times = [1.7 * s for s in blocks[1::2] for _ in range(BLOCK)]
    found = ratio(times, baseline)
    assert found["ratio"] == pytest.approx(1.7) and found["quartiles"] == pytest.approx([1.7, 1.7])
    assert found["rounds"] == 5 * BLOCK


def test_a_ratio_does_not_see_one_slow_baseline():
    found = ratio([2.0] * BLOCK, [1.0, 9.0, *[1.0] * (2 * BLOCK - 2)])
    assert found["quartiles"] == [2.0, 2.0]


def test_peak_bytes_of_known_allocations():
    def run():
        a = torch.ones(1 << 20)  # 4 MB
        b = torch.cat([a, a])  # 8 MB more
        del a
        return torch.cat([b, b[:1]])  # 8 MB while b is alive: 16 in all

    assert peak_bytes(run, "cpu") == pytest.approx(16 * 2**20, rel=0.01)


def test_flops_of_attention_are_those_of_its_two_products_and_their_four_in_backward():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    products = 2 * 2 * 3 * 5 * 7 * 8
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * products
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 6 * products


def test_flops_of_a_linear_layer_and_its_backward():
    layer, x = torch.nn.Linear(30, 20), torch.randn(7, 30, requires_grad=True)
    assert count_flops(lambda: layer(x)) == 2 * 7 * 30 * 20
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 7 * 30 * 20


def test_the_environment_comes_back(monkeypatch):
    monkeypatch.setenv("MMF_FAST_OPS", "native")
    with environment(MMF_FAST_OPS="reference", MMF_FAST_NEW="1"):
        assert os.environ["MMF_FAST_OPS"] == "reference"
    assert os.environ["MMF_FAST_OPS"] == "native" and "MMF_FAST_NEW" not in os.environ


def test_a_stopwatch_takes_every_time():
    watch = Stopwatch(lambda: None, "cpu")
    watch(), watch()
    assert len(watch.times) == 2 and min(watch.times) >= 0
