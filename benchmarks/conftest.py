"""pytest benchmarks --benchmark-only [--full] [--benchmark-json=FILE]: the quick profile, or all of it.

The file is pytest-benchmark's own. A round is one timed run of ours; ratios, bounds, FLOPs and whatever else was found
are in `extra_info`. So --benchmark-autosave, --benchmark-compare and pytest-benchmark's commands work as ever, and
`python -m benchmarks.compare` compares the ratios.
"""

from __future__ import annotations

import ctypes
import platform
import signal
from typing import Any

import pytest
import torch

from benchmarks.measure import Stopwatch, circumstances, limits, machine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """glibc hands freed memory back to the system and asks for it again: up to a tenth of a step on a CPU, more or less
    by what ran before. Here it keeps it, as CUDA's allocator does and those that PyTorch recommends for CPUs do."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        if not (mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0) and mallopt(M_ARENA_MAX, 1)):
            raise RuntimeError("mallopt refuses to keep freed memory: timings would depend on what ran before")


keep_freed_memory()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmarks: every case, more rounds (about an hour)")
    parser.addoption("--length", type=float, default=None, help="benchmarks: seconds of timing per case (5; full: 8)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: measured by --full only")


def pytest_sessionstart(session: pytest.Session) -> None:
    """A run that is ended, by timeout(1) say, finishes the case it is at and writes the rows it has."""
    signal.signal(signal.SIGTERM, lambda *_: setattr(session, "shouldstop", "ended by SIGTERM"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem != "test_kernels")  # the short ones first, in memory yet unused
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=Stopwatch.clock))
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def length(request: pytest.FixtureRequest, full: bool) -> float:
    """Seconds of timing per case."""
    return request.config.getoption("--length") or (8.0 if full else 5.0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What does not change from run to run, so that --benchmark-compare warns where two machines differ."""
    machine_info.clear()
    machine_info |= machine(DEVICE)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Adds the limits of the machine and how the run was made; leaves single rounds out, as --benchmark-save does."""
    profile = "full" if config.getoption("--full") else "quick"
    output_json["run"] = circumstances() | {"profile": profile} | limits(DEVICE)
    for each in output_json["benchmarks"]:
        each["stats"].pop("data", None)
