"""Operators against the limits of the device: attention by its products, everything else by a copy of memory."""

from __future__ import annotations

from benchmarks.gpu.rows import Rows
from benchmarks.kernel_case import measure
from benchmarks.operators import OPERATORS, case_at, cases
from benchmarks.results import Row

SECONDS = 1.0  # of timing for a case


def run(rows: Rows, device: str, toy: bool) -> None:
    size, precision, length = ("toy", "fp32", 0.0) if toy else ("large", "bf16", SECONDS)
    operators = sorted(OPERATORS, key=lambda name: name != "attention")[: 3 if toy else None]
    # Against what inductor makes of the composition last: compiling takes longer than all that comes before.
    plan = [(name, False) for name in operators] + [(name, True) for name in operators[1:] if not toy]
    for operator, compiled in plan:
        for place, case in enumerate(cases(operator, precision, "meta", size)):

            def time(place: int = place, operator: str = operator, compiled: bool = compiled) -> Row:
                return measure(case_at(place, operator, precision, device, size), device, length, compiled)

            key = {"op": case.op, "shape": case.shape, "mode": case.mode, "precision": precision}
            rows.measure(key | {"compiled": compiled}, time)
