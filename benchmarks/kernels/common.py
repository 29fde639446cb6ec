"""What the kernel benchmarks share: a case, its timing, and the description of the machine."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Outputs = Sequence[Tensor]


class Case(NamedTuple):
    """One operator at one size. fused and composed compute the same, and return all they computed.

    bytes: the least that must move through memory (each input read once, each output written once).
    flops: multiply-adds counted as 2; 0 where memory is the limit.
    others: timed beside them, without a comparison of results, since they compute something else.
    compiles: whether torch.compile of `composed` means anything; not of a backward pass alone.
    """

    op: str
    shape: str
    mode: str  # "forward" or "forward + backward"
    fused: Callable[[], Outputs]
    composed: Callable[[], Outputs]
    bytes: int = 0
    flops: int = 0
    tolerance: float = 1e-4
    others: dict[str, Callable[[], Outputs]] = {}
    compiles: bool = True


def measure(case: Case, device: str, seconds: float = 2.0, compiled: bool = False) -> dict[str, Any]:
    """Medians of interleaved runs. Nothing is timed before both versions agree."""
    versions = {"fused": case.fused, "composed": case.composed}
    if compiled and case.compiles:
        versions["composed, compiled"] = torch.compile(case.composed)
    results = {name: [y.detach().double() for y in run()] for name, run in versions.items()}
    error = max(
        float((a - b).norm() / b.norm().clamp(min=1e-30))
        for a, b in zip(results["fused"], results["composed"], strict=True)
    )
    if not error < case.tolerance:
        raise SystemExit(f"{case.op} {case.shape}: fused and composed differ by {error:.1e}; not timed")
    del results
    versions |= case.others

    times: dict[str, list[float]] = {name: [] for name in versions}
    for run in versions.values():  # warm up
        _time(run, device)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times["fused"]) < 5:
        for name, run in versions.items():
            run()  # untimed: the run before was another version's, whose freed memory and caches are not this one's
            times[name].append(_time(run, device))
    medians = {name: statistics.median(t) for name, t in times.items()}
    speedup = {
        name: statistics.median(b / a for a, b in zip(times["fused"], times[name], strict=True))
        for name in versions
        if name != "fused"
    }
    return {
        "op": case.op,
        "shape": case.shape,
        "mode": case.mode,
        "ms": {name: round(1e3 * t, 4) for name, t in medians.items()},
        "speedup over": {name: round(s, 3) for name, s in speedup.items()},
        "GB/s": round(case.bytes / medians["fused"] / 1e9, 2) if case.bytes else None,
        "TFLOP/s": round(case.flops / medians["fused"] / 1e12, 3) if case.flops else None,
        "error against composed": error,
        "runs": len(times["fused"]),
    }


def _time(run: Callable[[], Outputs], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def backward(outputs: Iterable[Any], inputs: Sequence[Tensor], cotangents: Outputs) -> list[Tensor]:
    """The outputs and what the inputs receive."""
    outputs = list(outputs)
    return [*outputs, *torch.autograd.grad(outputs, list(inputs), list(cotangents))]


def copy_bandwidth(device: str, size: int) -> float:
    """GB/s of a copy, bytes read plus bytes written: the limit of the kernels that memory bounds."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    times = [_time(lambda: [target.copy_(source)], device) for _ in range(12)][2:]
    return 2 * size / statistics.median(times) / 1e9


def machine(device: str) -> dict[str, Any]:
    """Device, versions, commit, date, command and how busy the machine was."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "power limit": output("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader") if cuda else None,
        "capability": torch.cuda.get_device_capability() if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        "commit": output("git", "rev-parse", "HEAD"),
        "uncommitted changes": bool(output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.kernels " + " ".join(sys.argv[1:]),
        "load average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "processors": os.cpu_count(),
    }
