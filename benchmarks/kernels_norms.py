"""Norms, activations, the loss and the path, against the same composed of PyTorch's functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_case import Case, Outputs, backward
from mmf_fast.ops.group_norm import group_norm_silu
from mmf_fast.ops.layer_norm import modulated_layer_norm
from mmf_fast.ops.pointwise import activation, gelu_tangent, silu_tangent
from mmf_fast.ops.sg_loss import sg_loss

Draw = Callable[..., Tensor]  # draw(*shape, grad=True) -> a leaf of the dtype and on the device that are measured
DUAL_BACKWARD = "dual + backward"
IMAGES = {"toy": (1, 3, 4, 4), "small": (64, 3, 64, 64), "large": (512, 3, 256, 256)}


def sg_loss_cases(draw: Draw, size: str) -> Iterator[Case]:
    shape = IMAGES[size]
    u, du, target = draw(*shape), draw(*shape), draw(*shape, grad=False).float()
    tau, lam = torch.rand(shape[0], device=u.device), torch.tensor(0.5, device=u.device)
    yield Case(
        "sg_loss",
        str(shape),
        DUAL_BACKWARD,
        fused=lambda: _loss(u, du, sg_loss(u, du, tau, lam, target).loss),
        composed=lambda: _loss(u, du, _composed_loss(u, du, target, tau, lam)),
        bytes=6 * _bytes(u) + 2 * _bytes(target),
    )


def layer_norm_cases(draw: Draw, size: str) -> Iterator[Case]:
    shape = {"toy": (1, 2, 8), "small": (32, 64, 256), "large": (256, 256, 1152)}[size]
    x, dx, g, h = (draw(*shape, grad=i < 2) for i in range(4))
    modulation = [draw(shape[0], 1, shape[2]) for _ in range(4)]
    yield from dual_and_backward(
        "modulated_layer_norm",
        str(shape),
        lambda: backward(_fused_layer_norm(x, dx, *modulation), [x, dx, *modulation], [g, h]),
        lambda: backward(_composed_layer_norm(x, dx, *modulation), [x, dx, *modulation], [g, h]),
        _bytes(x),
    )


def group_norm_cases(draw: Draw, size: str) -> Iterator[Case]:
    shape = {"toy": (1, 32, 2, 2), "small": (16, 64, 32, 32), "large": (64, 256, 64, 64)}[size]
    for layout in (torch.contiguous_format, torch.channels_last):
        image = [draw(*shape, grad=False).contiguous(memory_format=layout) for _ in range(4)]
        yield from _group_norm(image, draw(shape[1]), draw(shape[1]), shape, layout)


def activation_cases(draw: Draw, size: str) -> Iterator[Case]:
    shape = {"toy": (1, 2, 8), "small": (32, 64, 1024), "large": (256, 256, 4608)}[size]
    x, dx, g, h = (draw(*shape, grad=i < 2) for i in range(4))
    for act in ("gelu_tanh", "gelu", "silu"):
        yield from dual_and_backward(
            f"activation {act}",
            str(shape),
            partial(_run_activation, activation, x, dx, g, h, act),
            partial(_run_activation, _composed_activation, x, dx, g, h, act),
            _bytes(x),
        )


def dual_and_backward(
    op: str, shape: str, fused: Callable[[], Outputs], composed: Callable[[], Outputs], each: int
) -> Iterator[Case]:
    """The forward pass alone reads x, dx and writes y, dy, each of `each` bytes; with the backward pass six more."""
    yield Case(op, shape, "dual", torch.no_grad()(fused), torch.no_grad()(composed), bytes=4 * each)
    yield Case(op, shape, DUAL_BACKWARD, fused, composed, bytes=10 * each)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _loss(u: Tensor, du: Tensor, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, (u, du))]


def _composed_loss(u: Tensor, du: Tensor, target: Tensor, tau: Tensor, lam: Tensor) -> Tensor:
    blend = torch.lerp(du.detach(), du, lam.to(du.dtype))
    error = u + tau.view(-1, 1, 1, 1).to(u.dtype) * blend - target
    square = error.float().square().flatten(1).sum(1)
    return (square * (square.detach() + 1e-3) ** -1.0).mean()


def _fused_layer_norm(x: Tensor, dx: Tensor, shift: Tensor, dshift: Tensor, scale: Tensor, dscale: Tensor) -> Any:
    return modulated_layer_norm(x, dx, 1 + scale, dscale, shift, dshift, eps=1e-6)


def _composed_layer_norm(x: Tensor, dx: Tensor, shift: Tensor, dshift: Tensor, scale: Tensor, dscale: Tensor) -> Any:
    n, dn = _standardised(x, dx, 1e-6)
    return n * (1 + scale) + shift, dn * (1 + scale) + n * dscale + dshift


def _standardised(x: Tensor, dx: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x^ and x^' over the last dimension, in float32 as autocast would."""
    wide, dx_wide = x.float(), dx.float()
    centred = wide - wide.mean(-1, keepdim=True)
    r = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    n = centred * r
    dn = r * (dx_wide - dx_wide.mean(-1, keepdim=True) - n * (n * dx_wide).mean(-1, keepdim=True))
    return n.to(x.dtype), dn.to(x.dtype)


def _group_norm(
    image: list[Tensor], gain: Tensor, bias: Tensor, shape: tuple[int, ...], layout: torch.memory_format
) -> Iterator[Case]:
    x, dx, g, h = image
    inputs = [x.requires_grad_(), dx.requires_grad_(), gain, bias]

    def composed() -> list[Tensor]:
        n, dn = _standardised(x.reshape(len(x), 32, -1), dx.reshape(len(x), 32, -1), 1e-5)
        u = n.view(x.shape) * gain.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
        du = dn.view(x.shape) * gain.view(1, -1, 1, 1)
        return backward([F.silu(u), silu_tangent(du, u)], inputs, [g, h])

    yield from dual_and_backward(
        "group_norm_silu",
        f"{shape}{' channels-last' if layout == torch.channels_last else ''}",
        lambda: backward(group_norm_silu(x, dx, 32, gain, None, bias, None), inputs, [g, h]),
        composed,
        _bytes(x),
    )


def _run_activation(function: Any, x: Tensor, dx: Tensor, g: Tensor, h: Tensor, act: str) -> list[Tensor]:
    return backward(function(x, dx, act), [x, dx], [g, h])


def _composed_activation(x: Tensor, dx: Tensor, act: str) -> tuple[Tensor, Tensor]:
    if act == "silu":
        return F.silu(x), silu_tangent(dx, x)
    approximate = "tanh" if act == "gelu_tanh" else "none"
    return F.gelu(x, approximate=approximate), gelu_tangent(dx, x, approximate)
