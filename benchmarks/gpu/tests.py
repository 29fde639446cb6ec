"""The tests that need a GPU, in the order in which they tell most: one case per kernel, dtype and head size first.

Also a pytest plugin: with pytest-xdist each worker orders the tests alike, and one whose device a kernel took away
ends, so that another takes over.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.rows import AGAIN, Rows, leave_a_lost_device

WORKERS = 12  # compilation is what takes the time, on the CPU
TOY_TESTS, TOY_COUNT = "tests/ops/test_pointwise.py", 3


def run(rows: Rows, device: str, toy: bool) -> None:
    arguments = ["-p", "benchmarks.gpu.tests", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-q"]
    arguments += [TOY_TESTS] if toy else ["-m", "gpu", *marked()]
    if not toy and importlib.util.find_spec("xdist"):
        arguments += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "load"]
    arguments += [f"--deselect={row['test']}" for row in rows.rows]  # it goes on
    status = pytest.main(arguments, plugins=[Report(rows)])
    if status == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        rows.add({"test": "all", "error": f"pytest ended with {pytest.ExitCode(status).name}"})


def marked() -> list[str]:
    """Where tests are marked gpu: the others need packages that a machine with a GPU may lack."""
    files = [path for path in sorted(Path("tests").rglob("*.py")) if "mark.gpu" in path.read_text()]
    return [str(path.parent if path.name == "conftest.py" else path) for path in files]


class Report:
    """Writes a row per test."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.rows.add({"test": report.nodeid, "error": _last_line(report)})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed):
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            self.rows.add(row | ({"error": _last_line(report)} if report.failed else {}))


def _last_line(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    said = crash.message if crash else str(report.longrepr)
    return " ".join(said.split())[:200]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The first test of each kind (function, dtype, head size) before all others; of a toy run nothing else."""
    seen: set[tuple] = set()
    first, rest = [], []
    for item in items:
        (rest if (kind := kind_of(item)) in seen else first).append(item)
        seen.add(kind)
    if not torch.cuda.is_available():
        first = [item for item in first if _parameters(item).get("device") == "triton"][:TOY_COUNT]
        config.hook.pytest_deselected(items=[item for item in items if item not in first])
        rest = []
    items[:] = first + rest


def kind_of(item: Any) -> tuple:
    """(file, function, implementation, dtype, head size), as far as a test has them."""
    parameters = _parameters(item)
    shape = parameters.get("shape")
    size = shape[-1] if isinstance(shape, tuple) and shape else shape
    name = getattr(item, "originalname", item.name)
    return item.path.name, name, parameters.get("device"), parameters.get("dtype"), size


def _parameters(item: Any) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def pytest_runtest_logfinish(nodeid: str) -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            leave_a_lost_device()
        except SystemExit:
            os._exit(AGAIN)  # of a worker: pytest-xdist names the test and starts another
