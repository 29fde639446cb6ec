"""Where the time of a step goes, what it takes of the device, and a trace of it.

A step has four phases: data (until the batch is on the device), loss (the forward pass with its JVP), backward, and
optimizer (clipping, update, moving average, and what ranks exchange for them).

    with phases("loss"):
        output = loss_fn(x)

On CUDA a phase lies between two events of the stream, which nobody waits for: the host runs ahead, and the time of
"data" is how long the device was kept waiting. On a CPU the clock is the host's. Each phase is also a range of
torch.profiler and, on CUDA and where the package nvtx is installed, of Nsight Systems.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from mmf_fast.files import writing

try:
    import nvtx
except ImportError:
    nvtx = None

__all__ = ["PHASES", "TRACED", "WARM_UP", "Phases", "Speed", "peak_memory", "tracer"]

PHASES = ("data", "loss", "backward", "optimizer")
WARM_UP, TRACED = 10, 3  # steps that a trace leaves out first, and steps it shows


class Phases:
    """The clock of one process' phases on `device`; a phase that comes twice is added up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds: Counter[str] = Counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._mark()
        with record_function(name), self._range(name):
            yield
        stop = self._mark()
        if self._cuda:
            self._pending.append((name, start, stop))
            self._collect(wait=False)
        else:
            self._seconds[name] += stop - start

    def read(self) -> dict[str, float]:
        """Seconds of each of PHASES since the last reading. On CUDA it waits for the device, as reading a loss does."""
        self._collect(wait=True)
        seconds = {name: float(self._seconds[name]) for name in PHASES}
        self._seconds.clear()
        return seconds

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _collect(self, wait: bool) -> None:
        """Adds up what the device has passed, so that no more events wait than the steps it is behind the host."""
        while self._pending and (wait or self._pending[0][2].query()):
            name, start, stop = self._pending.popleft()
            stop.synchronize()
            self._seconds[name] += start.elapsed_time(stop) / 1000

    def _range(self, name: str) -> AbstractContextManager[Any]:
        return nvtx.annotate(name, domain="mmf_fast") if self._cuda and nvtx else nullcontext()


class Speed:
    """What metrics.jsonl says of the time between two logged steps.

    images_per_second    of the global batch
    step_seconds         per step, and of it data_seconds, loss_seconds, backward_seconds, optimizer_seconds
    peak_memory_gib      see `peak_memory`
    mfu                  model FLOPs utilisation, where the peak is known: the FLOPs that the algorithm needs
                         (MeanFlowLoss.forwards x the network's), over those the devices could have done meanwhile

    batch: samples of a step over all processes.  peak: FLOP/s of all devices together, or None.
    """

    def __init__(self, phases: Phases, batch: int, peak: float | None) -> None:
        self.phases, self.batch, self.peak = phases, batch, peak
        self.restart()

    def restart(self) -> None:
        self.phases.read()
        self._since, self._steps, self._flops = time.perf_counter(), 0, 0.0

    def count(self, flops: float) -> None:
        """One more step, of so many model FLOPs over the global batch."""
        self._steps += 1
        self._flops += flops

    def read(self) -> dict[str, float]:
        """The figures since the last `restart`; the device should have nothing left to do."""
        phases = self.phases.read()
        seconds = time.perf_counter() - self._since
        figures = {"images_per_second": self._steps * self.batch / seconds, "step_seconds": seconds / self._steps}
        figures |= {f"{name}_seconds": phases[name] / self._steps for name in PHASES}
        figures["peak_memory_gib"] = peak_memory(self.phases.device) / 2**30
        return figures if self.peak is None else figures | {"mfu": self._flops / (seconds * self.peak)}


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that torch's tensors took at once on `device`, else the largest resident set so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM"):  # getrusage would start from the peak of the process that started this one
            return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # the others count in KiB


def tracer(path: Path) -> profile:
    """A profiler to enter and to `.step()` after each step: TRACED steps after WARM_UP others, as a Chrome trace (for
    ui.perfetto.dev) at `path`."""

    def write(found: profile) -> None:
        with writing(path) as draft:
            found.export_chrome_trace(str(draft))

    here = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    steps = schedule(skip_first=WARM_UP - 1, wait=0, warmup=1, active=TRACED, repeat=1)
    return profile(activities=here, schedule=steps, on_trace_ready=write)
