"""Every fused operator against the same composed of PyTorch's functions: pytest benchmarks/test_kernels.py

On the CPU float32 at sizes of small networks; on a GPU bfloat16 and float32 on tensors of 256 MB and more, and against
the compiled composition too. Every timed run follows an untimed one of the same version.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernel_case import Case, measure
from benchmarks.kernels_attention import attention_cases
from benchmarks.kernels_norms import (
    activation_cases,
    group_norm_cases,
    interpolate_cases,
    layer_norm_cases,
    sg_loss_cases,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = {
    "sg_loss": sg_loss_cases,
    "interpolate": interpolate_cases,
    "modulated_layer_norm": layer_norm_cases,
    "group_norm_silu": group_norm_cases,
    "activation": activation_cases,
    "attention": attention_cases,
}
DTYPES = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if DEVICE == "cuda" else {})


def cases(operator: str, precision: str, device: str) -> Iterator[Case]:
    def draw(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, device=device, dtype=DTYPES[precision]).requires_grad_(grad)

    return OPERATORS[operator](draw, large=DEVICE == "cuda")


def parameters() -> list[Any]:
    """Each case by its place among those of its operator; to name them no memory is needed."""
    return [
        pytest.param(operator, precision, i, id=f"{case.op} {case.shape} | {case.mode} | {precision}")
        for operator in OPERATORS
        for precision in DTYPES
        for i, case in enumerate(cases(operator, precision, "meta"))
    ]


@pytest.mark.parametrize(("operator", "precision", "place"), parameters())
def test_kernel(benchmark: Any, length: float, operator: str, precision: str, place: int) -> None:
    torch.manual_seed(0)
    case = next(itertools.islice(cases(operator, precision, DEVICE), place, None))
    case = case._replace(tolerance=1e-4 if precision == "fp32" else 3e-2)
    benchmark.group = operator
    row = measure(case, DEVICE, length / 4, compiled=DEVICE == "cuda", repeat=benchmark.pedantic)
    benchmark.extra_info |= row
    over = ", ".join(f"{found['ratio']:.2f} x {name}" for name, found in row["speedup over"].items())
    print(f"\n{case.op} {case.shape} {case.mode}: {1e3 * row['seconds']['fused']:.2f} ms, {over}")
