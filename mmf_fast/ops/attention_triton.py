"""Launchers of the attention kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmf_fast.ops import attention_kernels as kernels
from mmf_fast.ops.autotune import Call, run
from mmf_fast.ops.dispatch import constant_to_dynamo, has_flags
from mmf_fast.ops.gpu import triton
from mmf_fast.ops.tiles import Config, choices

__all__ = ["backward", "forward", "gradients", "has_kernels", "outputs"]


def forward(
    q: Tensor, dq: Any, k: Tensor, dk: Any, v: Tensor, dv: Any, mask: Any, causal: bool, scale: float, grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, d_o, lse, mu = outputs(q, dq, k, dk, v, dv)
    if lse.numel():
        run(_forward_call(q, dq, k, dk, v, dv, mask, o, d_o, lse, mu, causal, scale))
    return o, d_o, lse, mu


def backward(
    g: Any, h: Any, q: Tensor, dq: Any, k: Tensor, dk: Any, v: Tensor, dv: Any, mask: Any,
    o: Tensor, d_o: Any, lse: Tensor, mu: Any, causal: bool, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    if h is None:
        dq = dk = dv = d_o = mu = None
    grads = gradients(h, q, dq, k, dk, v, dv)
    if q.numel() == 0 or k.numel() == 0:
        return tuple(x.zero_() for x in grads)
    g = torch.zeros_like(o) if g is None else g
    for call in _backward_calls(g, h, q, dq, k, dk, v, dv, mask, o, d_o, lse, mu, grads, causal, scale):
        run(call)
    return grads


def has_kernels(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there are kernels for these: head sizes that are multiples of 8 up to 128, in numbers of tensor cores.

    Exact float32 (torch.backends.cuda.matmul.fp32_precision = "ieee", the default) is none: without tensor cores, or in
    three TF32 products, the backward kernels exceed the registers of a chip. The interpreter computes it.
    """
    numbers = q.dtype in (torch.float16, torch.bfloat16) or (q.dtype == torch.float32 and (_tf32() or not q.is_cuda))
    return numbers and max(q.shape[-1], v.shape[-1]) <= 128 and q.shape[-1] % 8 == v.shape[-1] % 8 == 0


@constant_to_dynamo
def _tf32() -> bool:
    chosen = torch.backends.cuda.matmul.fp32_precision
    return (torch.backends.fp32_precision if chosen == "none" else chosen) == "tf32"  # type: ignore[attr-defined]


def outputs(q: Tensor, dq: Any, k: Tensor, dk: Any, v: Tensor, dv: Any, *_: Any) -> tuple[Tensor, ...]:
    """O, O', LSE and mu, not yet computed."""
    logits = dq is not None or dk is not None
    o, lse = _empty(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    d_o = torch.empty_like(o) if logits or dv is not None else q.new_empty(0)
    return o, d_o, lse, torch.empty_like(lse) if logits else lse.new_empty(0)


def gradients(h: Any, q: Tensor, dq: Any, k: Tensor, dk: Any, v: Tensor, dv: Any) -> tuple[Tensor, ...]:
    """What q, q', k, k', v, v' receive, not yet computed; empty where there is no tangent, or no cotangent of O'."""
    pairs = ((q, q), (q, dq), (k, k), (k, dk), (v, v), (v, dv))
    return tuple(
        q.new_empty(0) if dx is None or (h is None and dx is not x) else _empty(x, x.shape[-1]) for x, dx in pairs
    )


def _empty(like: Tensor, width: int) -> Tensor:
    """(B, H, N, width) laid out as (B, N, H, width): what follows merges the heads."""
    batch, heads, rows, _ = like.shape
    return like.new_empty(batch, rows, heads, width).transpose(1, 2)


def _forward_call(
    q: Tensor, dq: Any, k: Tensor, dk: Any, v: Tensor, dv: Any, mask: Any,
    o: Tensor, d_o: Tensor, lse: Tensor, mu: Tensor, causal: bool, scale: float,
) -> Call:  # fmt: skip
    q, dq, k, dk, v, dv = map(_unit, (q, dq, k, dk, v, dv))
    arguments = _named(q=q, dq=dq, k=k, dk=dk, v=v, dv=dv, mask=mask, o=o, do=d_o, lse=lse, mu=mu)
    constants = _constants(q, v, mask, causal) | has_flags(DQ=dq, DK=dk, DV=dv)
    return _call(kernels.forward_kernel, q, k, arguments | {"scale": scale}, constants, q.shape[2], "block_m")


def _backward_calls(
    g: Tensor, h: Any, q: Tensor, dq: Any, k: Tensor, dk: Any, v: Tensor, dv: Any, mask: Any,
    o: Tensor, d_o: Any, lse: Tensor, mu: Any, grads: tuple[Tensor, ...], causal: bool, scale: float,
) -> Iterator[Call]:  # fmt: skip
    g, h, q, dq, k, dk, v, dv = map(_unit, (g, h, q, dq, k, dk, v, dv))
    delta, gam = torch.empty_like(lse), None if h is None else torch.empty_like(lse)
    arguments = _named(g=g, h=h, o=o, do=d_o, gam=gam) | {"del_ptr": delta}
    size = {"HAS_H": h is not None, "E": v.shape[-1]}
    yield _call(kernels.delta_kernel, q, k, arguments, size, q.shape[2], "block_m")

    flags = has_flags(H=h, DQ=dq, DK=dk, DV=dv) | _constants(q, v, mask, causal)
    arguments = _named(q=q, dq=dq, k=k, dk=dk, v=v, dv=dv, mask=mask, g=g, h=h, lse=lse, mu=mu, gam=gam)
    arguments |= {"del_ptr": delta, "scale": scale}
    g_q, g_dq, g_k, g_dk, g_v, g_dv = grads
    of_keys = arguments | _named(g_k=g_k, g_dk=g_dk, g_v=g_v, g_dv=g_dv)
    yield _call(kernels.key_kernel, q, k, of_keys, flags, k.shape[2], "block_n")
    yield _call(kernels.query_kernel, q, k, arguments | _named(g_q=g_q, g_dq=g_dq), flags, q.shape[2], "block_m")


def _unit(x: Any) -> Any:
    """x as load_rows reads it: unit stride in a row, other strides multiples of 8, rows of a head within 32 bits."""
    if x is None:
        return None
    whole = x.stride(-1) == 1 and all(s % 8 == 0 or n == 1 for s, n in zip(x.stride()[:-1], x.shape, strict=False))
    return x if whole and x.stride(-2) * x.shape[-2] < 2**31 else x.contiguous()


def _named(**tensors: Any) -> dict[str, Any]:
    """Pointers and strides, by the names that the kernels give them."""
    strides = {
        f"{name}_strides": None if x is None else x.stride() if name == "mask" else tuple(s // 8 for s in x.stride())
        for name, x in tensors.items()
    }
    return {f"{name}_ptr": x for name, x in tensors.items()} | strides


def _constants(q: Tensor, v: Tensor, mask: Any, causal: bool) -> dict[str, Any]:
    return {
        "MASK": "none" if mask is None else "bool" if mask.dtype == torch.bool else "bias",
        "CAUSAL": causal,
        "D": q.shape[-1],
        "E": v.shape[-1],
        "PRECISION": "tf32" if q.dtype == torch.float32 and _tf32() else "ieee",
    }


def _call(kernel: Any, q: Tensor, k: Tensor, arguments: dict, constants: dict, rows: int, block: str) -> Call:
    (_, H, N, _), M = q.shape, k.shape[2]
    arguments = arguments | {"H": H, "N": N, "M": M}
    wanted = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    kind = kernel.__name__.removesuffix("_kernel")
    numbers = "tf32" if q.dtype == torch.float32 else "16 bits"
    width = max(constants.get("D", 0), constants["E"])
    masked = constants.get("MASK", "none") != "none"
    heads = q.shape[0] * H
    sizes = tuple(map(triton.next_power_of_2, (N, M, heads)))

    def grid(config: Config) -> int:
        return heads * triton.cdiv(rows, getattr(config, block))

    return Call(kernel, grid, wanted, constants, functools.partial(choices, kind, width, numbers, masked), sizes)
