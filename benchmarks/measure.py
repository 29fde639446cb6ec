"""What the benchmarks measure with: timers, ratios, peak memory, FLOPs, and a description of the machine."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Run = Callable[[], Any]
HEAD_START = 2_000_000  # clock cycles, about a millisecond


class Stopwatch:
    """A run that takes down its times, in seconds: between events of the device on a GPU, by the clock on the CPU."""

    total = 0.0  # of all stopwatches

    def __init__(self, run: Run, device: str) -> None:
        self.run, self.device, self.times = run, device, list[float]()

    def __call__(self) -> None:
        self.times.append(seconds(self.run, self.device))
        Stopwatch.total += self.times[-1]

    @staticmethod
    def clock() -> float:
        """A timer for pytest-benchmark. It goes on by what stopwatches measure and by nothing else, so that the rounds
        of pytest-benchmark are these times; what no stopwatch measures takes 0 s."""
        return Stopwatch.total


def seconds(run: Run, device: str) -> float:
    """The time of one run. A GPU waits a moment first: as in training, the host is ahead of it, so that what Python
    needs to launch the first kernels is not counted; a run that the host cannot feed fast enough still shows it."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def head_start(device: str) -> float:
    """Seconds that a GPU waits before a timed run, at about 1.8 GHz."""
    return 0.0 if device == "cpu" else HEAD_START / 1.8e9


def repeat(run: Run, setup: Run, rounds: int) -> None:
    """What pytest-benchmark's `pedantic` does, where no pytest runs."""
    for _ in range(rounds):
        setup()
        run()


BLOCK = 3  # timed runs of a version in a row


def ratio(times: list[float], baseline: list[float]) -> dict[str, Any]:
    """Median and quartiles of each run over the baselines around it, where the two took turns by blocks of BLOCK runs:
    baseline, run, baseline, ..., baseline.

    A machine that slows down for a while slows both, so pairs tell more than two medians do.
    """
    around = [statistics.median(baseline[i : i + BLOCK]) for i in range(0, len(baseline), BLOCK)]
    pairs = [t / ((around[i // BLOCK] + around[i // BLOCK + 1]) / 2) for i, t in enumerate(times)]
    low, middle, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
    return {
        "ratio": middle,
        "quartiles": [low, high],
        "seconds": statistics.median(times),
        "baseline seconds": statistics.median(baseline),
        "rounds": len(pairs),
    }


def reason(error: BaseException) -> str:
    """Type and message of an error in one line. Dynamo's messages say where, and quote why; the quote is kept."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    quoted = re.search(r": got (\w+)\(['\"](.*)", said)
    return (f"{quoted[1]}: {quoted[2]}" if quoted else said)[:200]


def peak_bytes(run: Run, device: str) -> int:
    """The most that tensors held at once during one run, beyond what they held before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    held = peak = 0
    events = (event for event in found.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def take_gradient(net: nn.Module) -> Tensor:
    """The gradient of all weights as one vector; afterwards the weights have none."""
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    net.zero_grad(set_to_none=True)
    return gradient


def training_step(net: nn.Module, loss_fn: nn.Module, x: Tensor, precision: str) -> Run:
    """A training step at a learning rate of 0, so that every case meets the same weights."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, fused=True)
    counter = itertools.count()

    def run() -> None:
        loss_of(loss_fn, x, precision, step=next(counter)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def loss_of(loss_fn: nn.Module, x: Tensor, precision: str, step: int = 0) -> Tensor:
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return loss_fn(x, step=step).loss


class _Counter(TorchDispatchMode):
    """FLOPs of what is dispatched, by torch's formulas; FlopCounterMode itself cannot count a double backward."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(run: Run) -> int:
    """FLOPs of matrix products and convolutions in one eager run, 2 per multiply-add; fused operators and attention are
    composed of PyTorch's for the count, which sees these alone and what the algorithm needs, nothing recomputed."""
    with environment(MMF_FAST_OPS="reference"), sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
        run()
    return counter.flops


@contextmanager
def environment(**values: str) -> Any:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def copy_bandwidth(device: str, size: int | None = None) -> float:
    """Bytes per second of a copy, read plus written: the limit of what memory bounds. size: of each side, in bytes."""
    size = size or 1 << (26 if device == "cpu" else 30)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median([seconds(lambda: target.copy_(source), device) for _ in range(12)][2:])


def product_rate(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a large square matrix product: the limit of what arithmetic bounds."""
    size = size or (1536 if device == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / statistics.median([seconds(lambda: a @ b, device) for _ in range(8)][2:])


def limits(device: str, size: int | None = None) -> dict[str, Any]:
    """What bounds everything else on this machine. size: of the copy, in bytes, and of the product: for quick tests."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    side = size and round((size / 4) ** 0.5)
    return {
        "copy GB/s": copy_bandwidth(device, size) / 1e9,
        "product GFLOP/s": {name: product_rate(device, dtype, side) / 1e9 for name, dtype in dtypes.items()},
    }


def machine(device: str) -> dict[str, Any]:
    """Device and versions."""
    cuda = device != "cpu"
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "power limit": _output("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader") if cuda else None,
        "capability": torch.cuda.get_device_capability() if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
    }


def circumstances() -> dict[str, Any]:
    """Commit, date, command and how busy the machine was."""
    return {
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted changes": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m pytest" if "pytest" in sys.argv[0] else sys.argv[0], *sys.argv[1:]]),
        "load average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _output("lscpu").splitlines() if line.startswith("Model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
