"""The choice of block sizes, with made-up times."""

import pytest
import torch

from mmf_fast.ops import autotune
from mmf_fast.ops.autotune import Call, Config, chip, usable

CONFIGS = [Config(64, 64, 4, 2, since=100), Config(64, 32, 4, 2, since=90), Config(32, 32, 4, 2), Config(16, 16, 4, 1)]


@pytest.fixture
def timed(monkeypatch):
    """Every configuration that was timed, on a Hopper that is not there; the last is the fastest."""
    seen = []

    def time(call, config):
        seen.append(config)
        return -len(seen)

    monkeypatch.setattr(autotune, "_time", time)
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.use_deterministic_algorithms(False)
    return seen


def choose(*sizes):
    def kernel(): ...

    return autotune._choice(Call(kernel, lambda c: 1, {"x": torch.zeros(1)}, {"D": 64}, CONFIGS, sizes), "cuda:0")


def test_the_fastest_configuration_for_the_chip_is_found_once_per_class_of_sizes(timed):
    assert choose(256) == CONFIGS[-1] and timed == CONFIGS[1:]
    assert choose(256) == CONFIGS[-1] and len(timed) == 3
    choose(512)
    assert len(timed) == 6


def test_nothing_is_timed_where_results_must_repeat_or_the_user_says_so(timed, monkeypatch):
    torch.use_deterministic_algorithms(True)
    assert choose(256) == CONFIGS[1]
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("MMF_FAST_AUTOTUNE", "0")
    assert choose(256) == CONFIGS[1] and not timed


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((12, 0), 80)]
)
def test_chips_with_small_shared_memory_count_as_ampere(capability, expected):
    assert chip(capability) == expected
    assert all(config.since <= expected for config in usable(CONFIGS, expected))
