"""The rows of a run: what is written, how they are found again, and what they reach of the machine's limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


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
