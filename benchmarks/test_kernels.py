"""Every fused operator against the same composed of PyTorch's functions: pytest benchmarks/test_kernels.py

On the CPU float32 at sizes of small networks; on a GPU bfloat16 and float32 on tensors of 256 MB and more, and against
the compiled composition too. Every timed run follows an untimed one of the same version.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.kernel_case import measure
from benchmarks.operators import OPERATORS, case_at, cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = "large" if DEVICE == "cuda" else "small"
PRECISIONS = ["fp32", "bf16"] if DEVICE == "cuda" else ["fp32"]


def parameters() -> list[Any]:
    """Each case by its place among those of its operator; to name them no memory is needed."""
    return [
        pytest.param(operator, precision, i, id=f"{case.op} {case.shape} | {case.mode} | {precision}")
        for operator in OPERATORS
        for precision in PRECISIONS
        for i, case in enumerate(cases(operator, precision, "meta", SIZE))
    ]


@pytest.mark.parametrize(("operator", "precision", "place"), parameters())
def test_kernel(benchmark: Any, length: float, operator: str, precision: str, place: int) -> None:
    case = case_at(place, operator, precision, DEVICE, SIZE)
    benchmark.group = operator
    row = measure(case, DEVICE, length / 4, compiled=DEVICE == "cuda", repeat=benchmark.pedantic)
    benchmark.extra_info |= row
    over = ", ".join(f"{found['ratio']:.2f} x {name}" for name, found in row["speedup over"].items())
    print(f"\n{case.op} {case.shape} {case.mode}: {1e3 * row['seconds']['fused']:.2f} ms, {over}")
