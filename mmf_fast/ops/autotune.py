"""Launching Triton kernels whose block sizes depend on the device: the fastest of a few configurations, found once.

A kernel, its constants and the class of its sizes are timed with every configuration at their first call on a device,
and the choice is kept for the life of the process. The default (the first configuration for the chip) is taken without
timing while a CUDA graph is captured, under torch.use_deterministic_algorithms (another choice rounds differently),
with MMF_FAST_AUTOTUNE=0, and by the ranks of a run of several: those that time keep the others waiting in the next
collective, noise makes them choose differently, and the slowest choice sets the pace of all. A choice shared by a
collective would be worse, since ranks may meet a class of sizes at different times or alone.

The interpreter has small blocks, so that small tests have several.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmf_fast.ops.gpu import triton
from mmf_fast.ops.tiles import Config

__all__ = ["Call", "blocks", "chip", "launch", "run"]


class Call(NamedTuple):
    """One launch: everything but the configuration."""

    kernel: Any
    grid: Callable[[Config], int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    configs: Callable[[int], list[Config]]  # for a chip, see `chip`; the first is the default
    sizes: tuple[int, ...]  # the class of its sizes: calls that agree in it share a choice


_chosen: dict[Any, Config] = {}
_INTERPRETED = Config(32, 16, 4, 1)
_SMALL = Config(16, 16, 4, 1)  # fits every chip


def blocks(config: Config, kernel: Any) -> dict[str, int]:
    """The block sizes of a configuration, as far as the kernel has them."""
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    return {name: size for name, size in sizes.items() if name in kernel.arg_names}


def run(call: Call) -> None:
    """Launch with the fastest configuration."""
    device = next(x.device for x in call.arguments.values() if isinstance(x, Tensor))
    if device.type != "cuda":
        return launch(call, _INTERPRETED)
    _launch_what_fits(call, device)


def _launch_what_fits(call: Call, device: torch.device) -> None:
    """With the choice; where its tiles are too large for a chip that has less shared memory than its kin (8.6 and 8.9
    have 99 KiB, 8.0 has 163), with the next smaller ones, from then on."""
    chosen = _choice(call, device)
    try:
        return launch(call, chosen)
    except triton.runtime.errors.OutOfResources as error:
        too_large = error
    configs = call.configs(chip(torch.cuda.get_device_capability(device)))
    for config in (*configs, *(c._replace(stages=1) for c in configs), _SMALL):
        if config != chosen:
            with suppress(triton.runtime.errors.OutOfResources):
                launch(call, config)
                _chosen[_key(call, device)] = config
                return
    raise too_large


def chip(capability: tuple[int, int]) -> int:
    """80, 90 or 100: Ampere and all with its small shared memory, Hopper, or Blackwell of data centres."""
    return {9: 90, 10: 100}.get(capability[0], 80)


def _key(call: Call, device: torch.device) -> tuple[Any, ...]:
    dtypes = tuple(x.dtype for x in call.arguments.values() if isinstance(x, Tensor))
    return call.kernel.__name__, device, dtypes, tuple(call.constants.items()), call.sizes


def _choice(call: Call, device: torch.device) -> Config:
    key = _key(call, device)
    if key in _chosen:
        return _chosen[key]
    configs = call.configs(chip(torch.cuda.get_device_capability(device)))
    if (
        len(configs) == 1
        or _several_ranks()
        or os.environ.get("MMF_FAST_AUTOTUNE") == "0"
        or torch.are_deterministic_algorithms_enabled()
        or torch.cuda.is_current_stream_capturing()
    ):
        return configs[0]
    times = {config: _time(call, config) for config in configs}
    _chosen[key] = min(times, key=times.__getitem__)
    return _chosen[key]


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _time(call: Call, config: Config) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(call, config), warmup=5, rep=20, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def launch(call: Call, config: Config) -> None:
    call.kernel[(call.grid(config),)](
        **call.arguments,
        **call.constants,
        **blocks(config, call.kernel),
        num_warps=config.warps,
        num_stages=config.stages,
    )
