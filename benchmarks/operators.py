"""The operators that are measured, and their cases at every size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernel_case import Case
from benchmarks.kernels_attention import attention_cases
from benchmarks.kernels_norms import activation_cases, group_norm_cases, layer_norm_cases, sg_loss_cases

OPERATORS = {
    "sg_loss": sg_loss_cases,
    "modulated_layer_norm": layer_norm_cases,
    "group_norm_silu": group_norm_cases,
    "activation": activation_cases,
    "attention": attention_cases,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases(operator: str, precision: str, device: str, size: str) -> Iterator[Case]:
    """size: "small" for a CPU, "large" for a GPU, or "toy". On "meta" they have names, and take no memory."""

    def draw(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, device=device, dtype=DTYPES[precision]).requires_grad_(grad)

    for case in OPERATORS[operator](draw, size):
        yield case._replace(tolerance=1e-4 if precision == "fp32" else 3e-2)


def case_at(place: int, operator: str, precision: str, device: str, size: str) -> Case:
    """One of them, by its place in `cases`, from seeded inputs."""
    torch.manual_seed(0)
    return next(itertools.islice(cases(operator, precision, device, size), place, None))
