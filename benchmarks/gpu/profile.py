"""What the time of a training step goes to, by kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import CASES, GPU_NETWORKS, Network
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.steps import TOYS
from benchmarks.measure import Run, seconds, training_step
from benchmarks.results import Row
from benchmarks.step_case import BY_BLOCK, EAGER, Workload, build

PLAN = [
    ("DiT-B/4", BY_BLOCK, "lambda 1, 25 %"),
    ("DiT-B/4", EAGER, "lambda 1, 25 %"),
    ("DiT-B/4", BY_BLOCK, "lambda 0, 25 %"),
    ("UNet", BY_BLOCK, "lambda 1, 25 %"),
    ("UNet", EAGER, "lambda 1, 25 %"),
]
STEPS, SHOWN = 3, 30  # steps that are profiled; kernels that are named, the rest being summed up


def run(rows: Rows, device: str, toy: bool) -> None:
    networks: dict[str, Network] = TOYS if toy else GPU_NETWORKS
    precision = "fp32" if toy else "bf16"
    for network, mode, name in [(n, EAGER, c) for n, _, c in PLAN[:1]] if toy else PLAN:
        key = {"network": network, "mode": mode, "precision": precision, "name": name}
        rows.measure(key, lambda n=networks[network], m=mode, c=name: _row(n, device, m, precision, c))


def _row(network: Network, device: str, mode: str, precision: str, name: str) -> Row:
    made = Workload.of(network, device, mode, precision)
    step = training_step(made.net, build(CASES[name], made.net, mode), made.x, precision)
    for _ in range(3):
        step()
    took = min(seconds(step, device) for _ in range(STEPS))
    return {"seconds": took} | by_kernel(step, device, took)


def by_kernel(step: Run, device: str, took: float) -> Row:
    """Of one step: launches, the share of its time `took` that the device was busy, and each kernel's share of that."""
    cuda = device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in found.key_averages() if event.device_type == wanted]
    time = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(((getattr(e, time) / STEPS / 1e6, e.count / STEPS, e.key) for e in events), reverse=True)
    busy = sum(event[0] for event in events)
    if not busy:
        raise RuntimeError("the profiler saw no kernel: CUPTI is missing, or another profiler holds it")
    kernels: list[dict[str, Any]] = [
        {"kernel": name[:120], "launches": count, "seconds": took, "share": took / busy}
        for took, count, name in events[:SHOWN]
    ]
    others = busy - sum(event[0] for event in events[:SHOWN])
    return {
        "launches": sum(event[1] for event in events),
        "busy": busy / took,
        "kernels": kernels,
        "seconds of the others": others,
    }
