"""The choice of block sizes, with made-up times."""

import pytest
import torch

from mmf_fast.ops import autotune
from mmf_fast.ops.autotune import Call, chip
from mmf_fast.ops.tiles import TILES, Config, choices

CONFIGS = [Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(16, 16, 4, 1)]


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

    return autotune._choice(
        Call(kernel, lambda c: 1, {"x": torch.zeros(1)}, {"D": 64}, {90: CONFIGS}.__getitem__, sizes), "cuda:0"
    )


def test_the_fastest_configuration_for_the_chip_is_found_once_per_class_of_sizes(timed):
    assert choose(256) == CONFIGS[-1] and timed == CONFIGS
    assert choose(256) == CONFIGS[-1] and len(timed) == 3
    choose(512)
    assert len(timed) == 6


def test_nothing_is_timed_where_results_must_repeat_or_the_user_says_so(timed, monkeypatch):
    torch.use_deterministic_algorithms(True)
    assert choose(256) == CONFIGS[0]
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("MMF_FAST_AUTOTUNE", "0")
    assert choose(256) == CONFIGS[0] and not timed


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((12, 0), 80)]
)
def test_chips_with_small_shared_memory_count_as_ampere(capability, expected):
    assert chip(capability) == expected


@pytest.mark.parametrize("kernel", TILES)
@pytest.mark.parametrize("number", [80, 90, 100])
@pytest.mark.parametrize("numbers", ["16 bits", "tf32"])
def test_every_head_size_has_tiles_on_every_chip(kernel, number, numbers):
    entries = {d: config for (c, d, n), config in TILES[kernel].items() if (c, n) == (number, numbers)}
    for size in range(8, 129, 8):
        first, *others = choices(kernel, size, numbers, number)
        assert first == entries[min(d for d in entries if d >= size)]
        assert set(others) == {entries[d] for d in entries if d >= size} - {first}
        assert len({first, *others}) == 1 + len(others)


def test_a_head_that_no_entry_covers_is_named():
    with pytest.raises(KeyError, match="no tiles of forward for chip 90, head size 136, 16 bits"):
        choices("forward", 136, "16 bits", 90)
