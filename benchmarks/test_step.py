"""One training step against the flow-matching step of the same network: pytest benchmarks/test_step.py

How it is measured: benchmarks/step_case.py. A way of the field that fails here is a row with its error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, CPU_NETWORKS, GPU_NETWORKS, OURS, TOKENS, WIDTHS
from benchmarks.step_case import Workload, measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NETWORKS = {**(CPU_NETWORKS if DEVICE == "cpu" else GPU_NETWORKS), **TOKENS, **WIDTHS}


@pytest.fixture(scope="module")
def workloads() -> Callable[..., Workload]:
    """Made once per (network, mode, precision)."""
    made: dict[tuple[str, str, str], Workload] = {}

    def get(name: str, mode: str, precision: str) -> Workload:
        key = (name, mode, precision)
        if key not in made:
            made.clear()  # one after the other: two do not fit where one is large
            made[key] = Workload.of(NETWORKS[name], DEVICE, mode, precision)
        return made[key]

    return get


def parameters() -> list[Any]:
    """(network, mode, precision, case): what the quick profile measures, and what --full adds."""
    main = list(CPU_NETWORKS if DEVICE == "cpu" else GPU_NETWORKS)
    exact = ["lambda 0, 100 %", "lambda 1, 100 %"]
    quarter = ["lambda 0, 25 %", "lambda 0, 25 %, paired", "lambda 1, 25 %", "lambda 0.5 stochastic, 25 %, paired"]
    field = [name for name, case in CASES.items() if case.way != OURS]
    at_zero = [name for name in field if CASES[name].lam == 0]
    if DEVICE == "cpu":
        quick = [
            (main[0], "compiled", "fp32", [*exact, "lambda 0, 25 %, paired"]),
            (main[0], "eager", "fp32", [*exact, *quarter, *field]),
            (main[1], "eager", "fp32", [*exact, field[0]]),
        ]
        more = [
            (main[0], "eager", "fp32", list(CASES)),
            (main[0], "compiled", "fp32", [*exact, *quarter, "lambda 0, 25 %, predicted", *field]),
            (main[1], "eager", "fp32", [*exact, *quarter, *field]),
            (main[1], "compiled", "fp32", [*exact, *quarter, *at_zero]),
            (main[0], "eager", "bf16", [*exact, *quarter]),
            *((*row, "bf16", exact) for row in ((main[0], "compiled"), (main[1], "eager"))),
        ]
    else:  # the claim is about bfloat16 there
        quick = [(name, "compiled", "bf16", [*exact, *quarter, *field]) for name in main]
        more = [(name, mode, "bf16", list(CASES)) for name in main for mode in ("compiled", "eager")]
    more += [(name, "eager", "fp32", [*exact, field[0]]) for name in (*TOKENS, *WIDTHS)]
    wanted = {(*row[:3], name): profile for profile in (more, quick) for row in profile for name in row[3]}
    order = list(dict.fromkeys(row[:3] for row in quick + more))  # rows of one baseline together
    return [
        pytest.param(*row, id=" | ".join(row), marks=[] if wanted[row] is quick else [pytest.mark.full])
        for row in sorted(wanted, key=lambda row: (order.index(row[:3]), list(CASES).index(row[3])))
    ]


@pytest.mark.parametrize(("network", "mode", "precision", "name"), parameters())
def test_step(
    benchmark: Any, workloads: Any, length: float, network: str, mode: str, precision: str, name: str
) -> None:
    benchmark.group = f"{network}, {mode}, {precision}"
    row = measure(CASES[name], workloads(network, mode, precision), length, repeat=benchmark.pedantic)
    if "error" in row:
        benchmark.pedantic(lambda: None)  # nothing was timed; the row says why
    else:
        print(f"\n{benchmark.group}: {name}: {row['ratio']:.3f} (bound {row['bound']:.3f})")
    benchmark.extra_info |= row
