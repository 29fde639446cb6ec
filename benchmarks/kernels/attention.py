"""Attention with its tangent, against SDPA for the primal and PyTorch's functions for the tangent; and SDPA alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.common import Case
from mmf_fast.ops.attention import attention, attention_tangent

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def cases(device: str, dtype: torch.dtype, large: bool) -> Iterator[Case]:
    """Forward with tangent (12 N^2 d operations), backward through both (30 N^2 d) and through the primal alone
    (lambda = 0, 10 N^2 d). On a GPU in bfloat16: exact float32 is left to the reference there."""
    if large and dtype == torch.float32:
        return
    shapes = [(64, 16, 256, 72), (16, 16, 1024, 64), (4, 16, 4096, 64)] if large else [(8, 6, 64, 64), (8, 6, 256, 64)]
    for batch, heads, tokens, width in shapes:
        # As a network has them: views of one projection.
        projections = torch.randn(2, batch, tokens, 3, heads, width, device=device, dtype=dtype)
        inputs = [x.detach() for xs in projections.permute(0, 3, 1, 4, 2, 5) for x in xs]
        cotangents = list(torch.randn(2, batch, heads, tokens, width, device=device, dtype=dtype))
        yield from _cases(inputs, cotangents, 1e-4 if dtype == torch.float32 else 3e-2)


def _cases(inputs: list[Tensor], cotangents: list[Tensor], tolerance: float) -> Iterator[Case]:
    batch, heads, tokens, width = inputs[0].shape
    unit = batch * heads * tokens**2 * width
    common: dict[str, Any] = {"op": "attention", "shape": str(tuple(inputs[0].shape)), "tolerance": tolerance}
    leaves = [x.detach().requires_grad_() for x in inputs]
    primal = leaves[:3]

    def forward(function: Attention, tangent_grad: bool = True) -> Callable[[], list[Tensor]]:
        return torch.no_grad()(lambda: _present(function(*inputs, tangent_grad=tangent_grad)))

    def both(function: Attention, wanted: list[Tensor], tangent_grad: bool) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            outputs = [y for y in _present(function(*leaves, tangent_grad=tangent_grad)) if y.requires_grad]
            return list(torch.autograd.grad(outputs, wanted, cotangents[: len(outputs)]))

        return run

    def backward(function: Attention, wanted: list[Tensor], tangent_grad: bool) -> Callable[[], list[Tensor]]:
        outputs = [y for y in _present(function(*leaves, tangent_grad=tangent_grad)) if y.requires_grad]
        return lambda: list(torch.autograd.grad(outputs, wanted, cotangents[: len(outputs)], retain_graph=True))

    def case(mode: str, flops: int, measured: Any, *arguments: Any, compiles: bool = True) -> Case:
        wanted = (primal, False) if arguments else ()
        return Case(
            mode=mode,
            fused=measured(attention, *arguments),
            composed=measured(_composed, *arguments),
            others={"SDPA, no tangent": measured(_sdpa, *wanted)},
            flops=flops * unit,
            compiles=compiles,
            **common,
        )

    yield case("forward", 12, forward)
    yield case("forward + backward", 42, both, leaves, True)
    yield case("forward + backward, lambda = 0", 22, both, primal, False)
    yield case("backward", 30, backward, leaves, True, compiles=False)
    yield case("backward, lambda = 0", 10, backward, primal, False, compiles=False)


def _composed(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, tangent_grad: bool
) -> tuple[Tensor, Tensor]:
    y = F.scaled_dot_product_attention(q, k, v)
    with torch.set_grad_enabled(tangent_grad and torch.is_grad_enabled()):
        return y, attention_tangent(q, k, v, dq, dk, dv)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *_: Tensor, tangent_grad: bool) -> tuple[Tensor, None]:
    return F.scaled_dot_product_attention(q, k, v), None


def _present(outputs: tuple[Tensor, Tensor | None]) -> list[Tensor]:
    return [y for y in outputs if y is not None]
