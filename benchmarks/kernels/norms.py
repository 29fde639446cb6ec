"""Norms, activations, the loss and the path, against the same composed of PyTorch's functions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.common import Case, backward
from mmf_fast.ops.group_norm import group_norm_silu
from mmf_fast.ops.interpolate import interpolate
from mmf_fast.ops.layer_norm import modulated_layer_norm
from mmf_fast.ops.pointwise import activation, gelu_tangent, silu_tangent
from mmf_fast.ops.sg_loss import sg_loss


def cases(device: str, dtype: torch.dtype, large: bool) -> Iterator[Case]:
    """large: tensors of 256 MB and more, for a GPU; else of a small DiT and UNet."""
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    common: dict[str, Any] = {"mode": "forward + backward", "tolerance": tolerance}

    def draw(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(grad)

    shape: tuple[int, ...] = (512, 3, 256, 256) if large else (64, 3, 64, 64)
    u, du, x, noise = draw(*shape), draw(*shape), draw(*shape, grad=False), draw(*shape, grad=False)
    tau, lam = torch.rand(shape[0], device=device), torch.tensor(0.5, device=device)
    yield Case(
        "sg_loss",
        str(shape),
        fused=lambda: _loss(u, du, sg_loss(u, du, tau, lam, x=x, noise=noise).loss),
        composed=lambda: _loss(u, du, _composed_loss(u, du, x, noise, tau, lam)),
        bytes=6 * _bytes(u),
        **common,
    )
    t = torch.rand(shape[0], device=device)
    stored = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    yield Case(
        "interpolate",
        f"{shape} uint8",
        fused=lambda: interpolate(stored, noise, t),
        composed=lambda: _composed_path(stored, noise, t.view(-1, 1, 1, 1).to(dtype)),
        bytes=3 * _bytes(noise) + stored.numel(),
        mode="forward",
        tolerance=tolerance,
    )

    shape = (256, 256, 1152) if large else (32, 64, 256)
    x1, dx1, g, h = (draw(*shape, grad=i < 2) for i in range(4))
    modulation = [draw(shape[0], 1, shape[2]) for _ in range(4)]
    yield Case(
        "modulated_layer_norm",
        str(shape),
        fused=lambda: backward(_fused_layer_norm(x1, dx1, *modulation), [x1, dx1, *modulation], [g, h]),
        composed=lambda: backward(_composed_layer_norm(x1, dx1, *modulation), [x1, dx1, *modulation], [g, h]),
        bytes=10 * _bytes(x1),
        **common,
    )

    shape = (64, 256, 64, 64) if large else (16, 64, 32, 32)
    for layout in (torch.contiguous_format, torch.channels_last):
        image = [draw(*shape, grad=False).contiguous(memory_format=layout) for _ in range(4)]
        yield _group_norm_case(image, draw(shape[1]), draw(shape[1]), shape, layout, common)

    shape = (256, 256, 4608) if large else (32, 64, 1024)
    x3, dx3, g3, h3 = (draw(*shape, grad=i < 2) for i in range(4))
    for act in ("gelu_tanh", "gelu", "silu"):
        yield Case(
            f"activation {act}",
            str(shape),
            fused=partial(_run_activation, activation, x3, dx3, g3, h3, act),
            composed=partial(_run_activation, _composed_activation, x3, dx3, g3, h3, act),
            bytes=10 * _bytes(x3),
            **common,
        )


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _loss(u: Tensor, du: Tensor, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, (u, du))]


def _composed_loss(u: Tensor, du: Tensor, x: Tensor, noise: Tensor, tau: Tensor, lam: Tensor) -> Tensor:
    blend = torch.lerp(du.detach(), du, lam.to(du.dtype))
    error = u + tau.view(-1, 1, 1, 1).to(u.dtype) * blend - (noise - x)
    square = error.float().square().flatten(1).sum(1)
    return (square * (square.detach() + 1e-3) ** -1.0).mean()


def _composed_path(stored: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x = stored.to(noise.dtype) / 127.5 - 1
    return (1 - t) * x + t * noise, noise - x


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


def _group_norm_case(
    image: list[Tensor], gain: Tensor, bias: Tensor, shape: tuple, layout: torch.memory_format, common: dict[str, Any]
) -> Case:
    x, dx, g, h = image
    inputs = [x.requires_grad_(), dx.requires_grad_(), gain, bias]

    def composed() -> list[Tensor]:
        n, dn = _standardised(x.reshape(len(x), 32, -1), dx.reshape(len(x), 32, -1), 1e-5)
        u = n.view(x.shape) * gain.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
        du = dn.view(x.shape) * gain.view(1, -1, 1, 1)
        return backward([F.silu(u), silu_tangent(du, u)], inputs, [g, h])

    return Case(
        "group_norm_silu",
        f"{shape}{' channels-last' if layout == torch.channels_last else ''}",
        fused=lambda: backward(group_norm_silu(x, dx, 32, gain, None, bias, None), inputs, [g, h]),
        composed=composed,
        bytes=10 * _bytes(x),
        **common,
    )


def _run_activation(function: Any, x: Tensor, dx: Tensor, g: Tensor, h: Tensor, act: str) -> list[Tensor]:
    return backward(function(x, dx, act), [x, dx], [g, h])


def _composed_activation(x: Tensor, dx: Tensor, act: str) -> tuple[Tensor, Tensor]:
    if act == "silu":
        return F.silu(x), silu_tangent(dx, x)
    approximate = "tanh" if act == "gelu_tanh" else "none"
    return F.gelu(x, approximate=approximate), gelu_tangent(dx, x, approximate)
