"""Training steps over flow matching: their time, the share of the device's peak that they use, their memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks.cases import CASES, GPU_NETWORKS, Network, dit, unet
from benchmarks.gpu.rows import Rows
from benchmarks.results import Row
from benchmarks.step_case import BY_BLOCK, EAGER, Workload, measure
from mmf_fast.devices import peak_flops

SECONDS = 6.0  # of timing for a case
QUARTER, WHOLE = ["lambda 0, 25 %", "lambda 1, 25 %"], ["lambda 0, 100 %", "lambda 1, 100 %"]
PAIRED = ["lambda 0, 25 %, paired", "lambda 1, 25 %, paired"]
PLAN = [
    ("DiT-B/4", EAGER, QUARTER),  # needs no compiler: the first figures are there within a minute
    ("DiT-B/4", BY_BLOCK, QUARTER),
    ("UNet", EAGER, QUARTER),
    ("UNet", BY_BLOCK, QUARTER),
    ("DiT-B/4", BY_BLOCK, [*WHOLE, *PAIRED]),
    ("DiT-B/4", EAGER, WHOLE),
    ("UNet", BY_BLOCK, WHOLE),
    ("UNet", EAGER, WHOLE),
    ("DiT-XL/4", BY_BLOCK, QUARTER),  # last: the host takes long to make it
]
TOYS = {
    "DiT-B/4": dit(batch=8, tokens=4, width=32, depth=1, heads=2),
    "UNet": unet(batch=8, size=16, base_channels=32, channel_mults=(1, 2), blocks=1),
}
TOY_PLAN = [("DiT-B/4", EAGER, QUARTER), ("DiT-B/4", BY_BLOCK, QUARTER[:1]), ("UNet", EAGER, QUARTER[1:])]


def run(rows: Rows, device: str, toy: bool) -> None:
    precision, length = ("fp32", 0.0) if toy else ("bf16", SECONDS)
    networks: dict[str, Network] = TOYS if toy else GPU_NETWORKS
    for network, mode, names in TOY_PLAN if toy else PLAN:

        @functools.cache  # for all its cases; made within a row, since it may fail
        def workload(network: str = network, mode: str = mode) -> Workload:
            return Workload.of(networks[network], device, mode, precision)

        for name in names:
            key = {"network": network, "mode": mode, "precision": precision, "name": name}
            rows.measure(key, functools.partial(_row, name, workload, length))


def _row(name: str, workload: Callable[[], Workload], length: float) -> Row:
    made = workload()
    row = measure(CASES[name], made, length)
    peak = peak_flops(torch.device(made.device), made.precision)
    return row if peak is None else row | {"mfu": row["FLOP/s"] / peak}
