"""Attention with its tangent, against SDPA for the primal and PyTorch's functions for the tangent; beside them, kernels
without a tangent and those of others with one."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernel_case import Case
from mmf_fast.ops.attention import attention, attention_tangent

Attention = Callable[..., tuple[Tensor, Tensor | None]]
Runs = dict[str, Callable[[], list[Tensor]]]
SHAPES = {  # (batch, heads, tokens, head size); the last is the one that TVM's figures are of
    "toy": [(1, 1, 12, 16)],
    "small": [(8, 6, 64, 64), (8, 6, 256, 64)],
    "large": [
        (16, 16, 1024, 64), (16, 8, 1024, 128), (64, 16, 256, 72), (64, 12, 256, 64), (4, 16, 4096, 64),
        (1, 24, 4096, 128),
    ],
}  # fmt: skip


def attention_cases(draw: Callable[..., Tensor], size: str) -> Iterator[Case]:
    """Forward with tangent (12 N^2 d operations), backward through both (30 N^2 d) and through the primal alone
    (lambda = 0, 10 N^2 d). On a GPU in bfloat16: exact float32 is left to the reference there."""
    for batch, heads, tokens, width in SHAPES[size]:
        # As a network has them: views of one projection.
        projections = draw(2, batch, tokens, 3, heads, width, grad=False)
        if size == "large" and projections.dtype == torch.float32:
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
        plain = {f"{name}, no tangent": measured(function, *wanted) for name, function in plain_attentions(inputs[0])}
        return Case(
            mode=mode,
            fused=measured(attention, *arguments),
            composed=measured(_composed, *arguments),
            others=plain | others,
            flops=flops * unit,
            compiles=compiles,
            **common,
        )

    whole, zero = (leaves, True), (primal, False)
    yield case("dual", 12, forward, **_jvp_flash_attention(inputs), **_tvm(forward, inputs))
    yield case("dual + backward", 42, both, *whole, **_tvm(both, inputs, *whole))
    yield case("dual + backward, lambda = 0", 22, both, *zero)
    yield case("backward", 30, backward, *whole, compiles=False, **_tvm(backward, inputs, *whole))
    yield case("backward, lambda = 0", 10, backward, *zero, compiles=False)


def _composed(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, tangent_grad: bool
) -> tuple[Tensor, Tensor]:
    y = F.scaled_dot_product_attention(q, k, v)
    with torch.set_grad_enabled(tangent_grad and torch.is_grad_enabled()):
        return y, attention_tangent(q, k, v, dq, dk, dv)


def plain_attentions(q: Tensor) -> Iterator[tuple[str, Attention]]:
    """What computes attention without a tangent here: PyTorch's choice, and on a GPU each of its kernels, and
    FlashAttention 2, 3 and 4 where they are installed."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor, *_: Tensor, tangent_grad: bool, backend: Any = None) -> Any:
        with sdpa_kernel(backend) if backend else nullcontext():
            return F.scaled_dot_product_attention(q, k, v), None

    def flash(q: Tensor, k: Tensor, v: Tensor, *_: Tensor, tangent_grad: bool, package: str) -> Any:
        y = importlib.import_module(package).flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2), None

    yield "SDPA", sdpa
    if q.is_cuda:
        for name, backend in (("FLASH", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            yield f"SDPA {name}", functools.partial(sdpa, backend=backend)
        packages = {"flash_attn": "2", "flash_attn_interface": "3", "flash_attn.cute": "4"}
        for package, version in packages.items():
            if _installed(package):
                yield f"FlashAttention {version}", functools.partial(flash, package=package)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def _present(outputs: tuple[Tensor, Tensor | None]) -> list[Tensor]:
    return [y for y in outputs if y is not None]


def _jvp_flash_attention(inputs: list[Tensor]) -> Runs:
    """The public kernel of that name, where it is installed; its gradient does not go through the tangent."""
    if not inputs[0].is_cuda or not _installed("jvp_flash_attention"):
        return {}
    from jvp_flash_attention.jvp_attention import JVPAttn

    primals, tangents = (tuple(x.contiguous() for x in half) for half in (inputs[:3], inputs[3:]))
    return {"jvp_flash_attention": torch.no_grad()(lambda: list(torch.func.jvp(JVPAttn.fwd_dual, primals, tangents)))}


def _tvm(measured: Any, inputs: list[Tensor], *arguments: Any) -> Runs:
    """Terminal Velocity Matching's (lumalabs/tvm), where its checkout is on the path: the only other public kernel with
    a gradient through the tangent."""
    if not inputs[0].is_cuda or not _installed("jvp_utils.functional"):
        return {}
    from jvp_utils.functional import sdpa_jvp

    def dual(q: Tensor, k: Tensor, v: Tensor, *tangents: Tensor, tangent_grad: bool) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(sdpa_jvp, (q, k, v), tangents)

    return {"TVM": measured(dual, *arguments)}
