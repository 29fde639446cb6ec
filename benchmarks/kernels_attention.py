"""Attention with its tangent, against SDPA for the primal and PyTorch's functions for the tangent; and SDPA alone."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_case import Case
from mmf_fast.ops.attention import attention, attention_tangent

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def attention_cases(draw: Callable[..., Tensor], large: bool) -> Iterator[Case]:
    """Forward with tangent (12 N^2 d operations), backward through both (30 N^2 d) and through the primal alone
    (lambda = 0, 10 N^2 d). On a GPU in bfloat16: exact float32 is left to the reference there."""
    shapes = [(64, 16, 256, 72), (16, 16, 1024, 64), (4, 16, 4096, 64)] if large else [(8, 6, 64, 64), (8, 6, 256, 64)]
    for batch, heads, tokens, width in shapes:
        # As a network has them: views of one projection.
        projections = draw(2, batch, tokens, 3, heads, width, grad=False)
        if large and projections.dtype == torch.float32:
            return
        inputs = [x.detach() for xs in projections.permute(0, 3, 1, 4, 2, 5) for x in xs]
        cotangents = list(draw(2, batch, heads, tokens, width, grad=False))
        yield from _cases(inputs, cotangents)


def _cases(inputs: list[Tensor], cotangents: list[Tensor]) -> Iterator[Case]:
    batch, heads, tokens, width = inputs[0].shape
    unit = batch * heads * tokens**2 * width
    common: dict[str, Any] = {"op": "attention", "shape": str(tuple(inputs[0].shape))}
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
        @functools.cache
        def outputs() -> list[Tensor]:
            return [y for y in _present(function(*leaves, tangent_grad=tangent_grad)) if y.requires_grad]

        return lambda: list(torch.autograd.grad(outputs(), wanted, cotangents[: len(outputs())], retain_graph=True))

    def case(mode: str, flops: int, measured: Any, *arguments: Any, compiles: bool = True, **others: Any) -> Case:
        wanted = (primal, False) if arguments else ()
        return Case(
            mode=mode,
            fused=measured(attention, *arguments),
            composed=measured(_composed, *arguments),
            others={"SDPA, no tangent": measured(_sdpa, *wanted)} | others,
            flops=flops * unit,
            compiles=compiles,
            **common,
        )

    yield case("dual", 12, forward, **_jvp_flash_attention(inputs))
    yield case("dual + backward", 42, both, leaves, True)
    yield case("dual + backward, lambda = 0", 22, both, primal, False)
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


def _jvp_flash_attention(inputs: list[Tensor]) -> dict[str, Callable[[], list[Tensor]]]:
    """The public kernel of that name, where it is installed; its gradient does not go through the tangent."""
    if not inputs[0].is_cuda or not importlib.util.find_spec("jvp_flash_attention"):
        return {}
    from jvp_flash_attention.jvp_attention import JVPAttn

    primals, tangents = (tuple(x.contiguous() for x in half) for half in (inputs[:3], inputs[3:]))
    return {"jvp_flash_attention": torch.no_grad()(lambda: list(torch.func.jvp(JVPAttn.fwd_dual, primals, tangents)))}
