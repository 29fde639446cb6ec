"""The rows of a run: how a file becomes rows, how rows are found, and what they reach of the machine's limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """A file of pytest-benchmark as {"machine": ..., "rows": [...]}: a row is what a benchmark was called with and what
    it found, by name, and its suite (benchmarks/test_step.py: step). Raises OSError, ValueError for another file."""
    run = json.loads(path.read_text())
    try:
        rows = [
            {"suite": _suite(each["fullname"]), **(each["params"] or {}), **each["extra_info"]}
            for each in run["benchmarks"]
        ]
        return {"machine": run["machine_info"] | run["run"], "rows": rows}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of pytest benchmarks --benchmark-json: it lacks {error}") from error


def _suite(fullname: str) -> str:
    return fullname.partition(".py::")[0].rpartition("test_")[2]


def rows_of(run: dict[str, Any], suite: str, **fixed: Any) -> list[Row]:
    """The rows of a suite in which the named values are as given."""
    return [r for r in run["rows"] if r["suite"] == suite and all(r.get(k) == v for k, v in fixed.items())]


def share_of_roof(run: dict[str, Any], row: Row) -> float:
    """What an operator reaches of the copy bandwidth of its run where memory bounds it, else of its product rate."""
    machine = run["machine"]
    if row["bytes"]:
        return row["bytes/s"] / 1e9 / machine["copy GB/s"]
    return row["FLOP/s"] / 1e9 / machine["product GFLOP/s"][row["precision"]]


def crossed(rows: list[Row], line: Callable[[Row], str], column: Callable[[Row], str]) -> dict[str, dict[str, Row]]:
    """{line: {column: row}}, in the order in which they come."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(line(row), {})[column(row)] = row
    return found


def rounded(value: Any) -> Any:
    """What goes into a file: four digits of every float."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
