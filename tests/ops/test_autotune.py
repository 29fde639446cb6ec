"""The choice of block sizes, with made-up times."""

import os

import pytest
import torch
import torch.distributed as dist
from support.clean_server import processes

from mmf_fast.ops import autotune, gpu
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


def test_tiles_too_large_for_a_chip_give_way_to_smaller_ones(timed, monkeypatch):
    """Without timing, as on several ranks; the choice is kept."""
    launched = []

    def launch(call, config):
        launched.append(config)
        if config.block_m * config.stages > 32:
            raise gpu.triton.runtime.errors.OutOfResources(128, 99, "shared memory")

    def kernel(): ...

    monkeypatch.setattr(autotune, "launch", launch)
    monkeypatch.setenv("MMF_FAST_AUTOTUNE", "0")
    call = Call(kernel, lambda c: 1, {"x": torch.zeros(1)}, {"D": 64}, {90: CONFIGS[:2]}.__getitem__, (256,))
    autotune._launch_what_fits(call, "cuda:0")
    fits = Config(32, 32, 4, 1)
    assert launched == [*CONFIGS[:2], Config(64, 32, 4, 1), fits]
    autotune._launch_what_fits(call, "cuda:0")
    assert launched[4:] == [fits] and not timed


def test_ranks_take_the_same_tiles_and_wait_for_nobody(tmp_path):
    """Made-up times differ between the ranks, and the second meets sizes that the first never sees."""
    answers = processes.SimpleQueue()
    ranks = [processes.Process(target=one_rank, args=(rank, tmp_path, answers.put), daemon=True) for rank in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(60)
    assert [each.exitcode for each in ranks] == [0, 0]
    found = dict(answers.get() for _ in ranks)
    assert found[0] == [CONFIGS[0]] and found[1] == [CONFIGS[0]] * 2


def one_rank(rank, folder, answer):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    autotune._time = lambda call, config: (-1) ** rank * config.block_m
    torch.cuda.get_device_capability = lambda device: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    chosen = [choose(256)] + [choose(512)] * rank
    dist.barrier()
    dist.destroy_process_group()
    answer((rank, chosen))


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
        first, *others = choices(kernel, size, numbers, False, number)
        assert first == entries[min(d for d in entries if d >= size)]
        assert set(others) == {entries[d] for d in entries if d >= size} - {first}
        assert len({first, *others}) == 1 + len(others)


def test_a_mask_has_tiles_of_its_own_where_the_table_says_so():
    plain, masked = TILES["key"][80, 64, "16 bits"], TILES["key"][80, 64, "16 bits, mask"]
    assert choices("key", 64, "16 bits", False, 80)[0] == plain
    assert choices("key", 64, "16 bits", True, 80)[:2] == [masked, plain]
    assert choices("key", 72, "16 bits", True, 80) == choices("key", 72, "16 bits", False, 80)


def test_a_head_that_no_entry_covers_is_named():
    with pytest.raises(KeyError, match="no tiles of forward for chip 90, head size 136, 16 bits"):
        choices("forward", 136, "16 bits", False, 90)
