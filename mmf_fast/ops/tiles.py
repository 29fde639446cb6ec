"""The tiles of the attention kernels: one configuration for each kernel, chip, head size and kind of numbers.

Plain data, so that a sweep of tiles on a GPU can write it. Those of chip 90 for 16 bits and heads of 64, 80 and 128 are
chosen by what an H200 took for 1,024 tokens (benchmarks/results/h200/tiles.json). The others are what a static model of
the compiled kernels ranks first among those that pass tests/ops/test_compile_gate.py: their inner loop uses tensor
cores, does no product twice and spills no register.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["TILES", "Config", "choices"]


class Config(NamedTuple):
    """Queries and keys of a tile (a kernel takes those that it has), warps of a program, stages of its pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# kernel -> (chip, head size, numbers) -> configuration. chip: 80, 90 or 100, see mmf_fast.ops.autotune.chip. head size:
# of q or of v, the larger; the entry of the next larger size serves one that is not here. numbers: "16 bits",
# "tf32"; with ", mask" behind it, what serves calls with a mask in its place.
TILES: dict[str, dict[tuple[int, int, str], Config]] = {
    "forward": {
        (80, 64, "16 bits"): Config(128, 64, 8, 2),
        (80, 80, "16 bits"): Config(128, 32, 8, 2),
        (80, 96, "16 bits"): Config(128, 32, 8, 2),
        (80, 128, "16 bits"): Config(128, 16, 8, 2),
        (90, 64, "16 bits"): Config(64, 64, 4, 3),
        (90, 80, "16 bits"): Config(64, 64, 4, 2),
        (90, 96, "16 bits"): Config(128, 64, 8, 2),
        (90, 128, "16 bits"): Config(128, 64, 8, 2),
        (100, 64, "16 bits"): Config(128, 64, 8, 2),
        (100, 80, "16 bits"): Config(128, 32, 8, 2),
        (100, 96, "16 bits"): Config(128, 32, 8, 2),
        (100, 128, "16 bits"): Config(64, 32, 8, 2),
        (80, 64, "16 bits, mask"): Config(128, 32, 8, 3),
        (80, 64, "tf32"): Config(128, 32, 8, 1),
        (80, 80, "tf32"): Config(128, 16, 8, 1),
        (80, 128, "tf32"): Config(32, 32, 8, 2),
        (90, 64, "tf32"): Config(128, 64, 8, 1),
        (90, 80, "tf32"): Config(128, 32, 8, 2),
        (90, 128, "tf32"): Config(128, 16, 8, 1),
        (100, 64, "tf32"): Config(64, 32, 8, 2),
        (100, 80, "tf32"): Config(128, 16, 8, 1),
        (100, 128, "tf32"): Config(32, 32, 8, 2),
    },
    "delta": {
        (80, 128, "16 bits"): Config(32, 32, 4, 1),
        (90, 128, "16 bits"): Config(32, 32, 4, 1),
        (100, 128, "16 bits"): Config(32, 32, 4, 1),
        (80, 128, "tf32"): Config(32, 32, 4, 1),
        (90, 128, "tf32"): Config(32, 32, 4, 1),
        (100, 128, "tf32"): Config(32, 32, 4, 1),
    },
    "key": {
        (80, 64, "16 bits"): Config(16, 64, 4, 2),
        (80, 80, "16 bits"): Config(16, 64, 4, 2),
        (80, 96, "16 bits"): Config(16, 64, 4, 2),
        (80, 128, "16 bits"): Config(64, 32, 8, 2),
        (90, 64, "16 bits"): Config(32, 128, 8, 1),
        (90, 80, "16 bits"): Config(32, 128, 8, 2),
        (90, 96, "16 bits"): Config(16, 128, 8, 2),
        (90, 128, "16 bits"): Config(128, 32, 8, 2),
        (100, 64, "16 bits"): Config(64, 64, 8, 2),
        (100, 80, "16 bits"): Config(32, 64, 8, 2),
        (100, 96, "16 bits"): Config(32, 64, 8, 2),
        (100, 128, "16 bits"): Config(64, 32, 8, 2),
        (80, 64, "16 bits, mask"): Config(32, 32, 4, 2),
        (80, 32, "tf32"): Config(32, 64, 4, 1),
        (80, 64, "tf32"): Config(32, 32, 4, 1),
        (80, 80, "tf32"): Config(16, 64, 4, 1),
        (80, 128, "tf32"): Config(16, 16, 4, 1),
        (90, 32, "tf32"): Config(32, 128, 8, 1),
        (90, 64, "tf32"): Config(32, 32, 4, 1),
        (90, 80, "tf32"): Config(16, 128, 8, 1),
        (90, 128, "tf32"): Config(16, 16, 4, 1),
        (100, 32, "tf32"): Config(32, 64, 8, 1),
        (100, 64, "tf32"): Config(32, 32, 4, 1),
        (100, 80, "tf32"): Config(16, 64, 4, 1),
        (100, 128, "tf32"): Config(16, 16, 4, 1),
    },
    "query": {
        (80, 64, "16 bits"): Config(128, 32, 8, 2),
        (80, 80, "16 bits"): Config(64, 32, 4, 2),
        (80, 96, "16 bits"): Config(128, 16, 8, 2),
        (80, 128, "16 bits"): Config(128, 16, 8, 2),
        (90, 64, "16 bits"): Config(64, 32, 4, 3),
        (90, 80, "16 bits"): Config(64, 32, 4, 3),
        (90, 96, "16 bits"): Config(128, 32, 8, 2),
        (90, 128, "16 bits"): Config(128, 32, 8, 3),
        (100, 64, "16 bits"): Config(64, 64, 8, 2),
        (100, 80, "16 bits"): Config(64, 32, 8, 2),
        (100, 96, "16 bits"): Config(64, 32, 8, 2),
        (100, 128, "16 bits"): Config(64, 64, 8, 1),
        (90, 64, "16 bits, mask"): Config(128, 32, 8, 2),
        (80, 64, "tf32"): Config(128, 16, 8, 1),
        (80, 80, "tf32"): Config(64, 16, 4, 1),
        (80, 128, "tf32"): Config(32, 16, 8, 1),
        (90, 64, "tf32"): Config(128, 16, 8, 1),
        (90, 80, "tf32"): Config(128, 16, 8, 1),
        (90, 128, "tf32"): Config(32, 16, 8, 1),
        (100, 32, "tf32"): Config(64, 32, 4, 1),
        (100, 64, "tf32"): Config(32, 32, 4, 1),
        (100, 80, "tf32"): Config(64, 16, 4, 1),
        (100, 128, "tf32"): Config(32, 16, 8, 1),
    },
}


def choices(kernel: str, head_size: int, numbers: str, masked: bool, chip: int) -> list[Config]:
    """What may be tried for a kernel: its entry, which is the default, and those of larger heads, which need no more.

    Raises KeyError for a head size above all of the table.
    """
    kinds = (f"{numbers}, mask", numbers) if masked else (numbers,)
    entries = [
        (d, kinds.index(kind), config)
        for (on, d, kind), config in TILES[kernel].items()
        if on == chip and kind in kinds and d >= head_size
    ]
    if not entries:
        raise KeyError(f"no tiles of {kernel} for chip {chip}, head size {head_size}, {numbers}")
    return list(dict.fromkeys(config for *_, config in sorted(entries)))
