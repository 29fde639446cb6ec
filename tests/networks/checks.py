"""What a network must show to count, each against something independent of Duals."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mmf_fast import LambdaSchedule, MeanFlowLoss, TimeSampler, jvp
from networks.collection import Entry

BATCH = 4


def build(entry: Entry, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network in evaluation mode, its weights random where its authors start from zeros."""
    torch.manual_seed(0)
    net = entry.build().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.to(dtype)


def point(entry: Entry, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """z, r, t and the direction w of z; that of t is 1."""
    generator = torch.Generator().manual_seed(1)
    z, w = (torch.randn(batch, *entry.shape, dtype=dtype, generator=generator) for _ in range(2))
    t = torch.linspace(0.4, 0.9, batch, dtype=dtype)
    return z, 0.3 * t, t, w


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def dual(net: nn.Module, z: Tensor, r: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return jvp(lambda z, t: net(z, r, t), (z, t), (w, torch.ones_like(t)))


def gradients(net: nn.Module, y: Tensor) -> Tensor:
    parameters = [p for p in net.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
    )


def exactness(entry: Entry) -> dict[str, float]:
    """Primal, tangent and the gradient through the tangent, relative to plain forwards and backwards at shifted points:
    f'(0) = (8 (f(h) - f(-h)) - f(2h) + f(-2h)) / 12h, whose error is of order h^4."""
    net = build(entry)
    z, r, t, w = point(entry)
    u, du = dual(net, z, r, t, w)
    c = torch.randn(u.shape, dtype=u.dtype, generator=torch.Generator().manual_seed(2))
    gradient = gradients(net, (c * du).sum())

    h, shifted = 1e-5, {}
    for k in (-2, -1, 1, 2):
        y = net(z + k * h * w, r, t + k * h)
        shifted[k] = torch.cat([y.detach().flatten(), gradients(net, (c * y).sum())])
    truth = (8 * (shifted[1] - shifted[-1]) - shifted[2] + shifted[-2]) / (12 * h)
    with torch.no_grad():
        plain = net(z, r, t)
    return {
        "primal": relative(u, plain),
        "tangent": relative(du.flatten(), truth[: u.numel()]),
        "gradient": relative(gradient, truth[u.numel() :]),
    }


def loss_of(net: nn.Module) -> MeanFlowLoss:
    return MeanFlowLoss(net, times=TimeSampler(share=0.5), lam=LambdaSchedule(value=0.5), paired=True)


def step(loss: MeanFlowLoss, entry: Entry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss of a fixed batch, and its gradient."""
    generator = torch.Generator().manual_seed(3)
    x, noise = (torch.randn(BATCH, *entry.shape, dtype=dtype, generator=generator) for _ in range(2))
    t = torch.linspace(0.3, 0.9, BATCH, dtype=dtype)
    torch.manual_seed(4)  # which rows are pairs
    value = loss(x, noise=noise, times=(torch.where(torch.arange(BATCH) % 2 == 0, t, 0.3 * t), t)).loss
    return value.detach(), gradients(loss, value)


def in_float32(entry: Entry) -> float:
    """MeanFlowLoss at lambda 0.5 on paired batches, relative to float64."""
    single = step(loss_of(build(entry, torch.float32)), entry, torch.float32)
    double = step(loss_of(build(entry)), entry, torch.float64)
    return max(relative(a, b) for a, b in zip(single, double, strict=True))


def with_dropout(entry: Entry) -> float:
    """The tangent in training mode against differences of the primal, all from one seed: one mask for both."""
    net = build(entry).train()
    z, r, t, w = point(entry)

    def at(shift: float) -> tuple[Tensor, Tensor]:
        copied = copy.deepcopy(net)  # batch and spectral norm change their buffers
        torch.manual_seed(5)
        return dual(copied, z + shift * w, r, t + shift, w)

    h = 1e-5
    truth = (8 * (at(h)[0] - at(-h)[0]) - at(2 * h)[0] + at(-2 * h)[0]) / (12 * h)
    return relative(at(0.0)[1], truth)


def in_bf16(entry: Entry) -> float:
    """The tangent under autocast against the float64 one."""
    net, (z, r, t, w) = build(entry, torch.float32), point(entry, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        u, du = dual(net, z, r, t, w)
    (c * du.float()).sum().backward() if (c := torch.ones_like(du)) is not None else None
    if not all(p.grad is None or p.grad.isfinite().all() for p in net.parameters()):
        return float("nan")
    return relative(du, dual(net.double(), *(x.double() for x in (z, r, t, w)))[1])


def compiled(entry: Entry, backend: str = "aot_eager") -> float:
    """The compiled step, whole, against the eager one."""
    torch._dynamo.reset()
    loss = loss_of(build(entry))
    eager = step(loss, entry, torch.float64)
    loss.compile(backend=backend)
    return max(relative(a, b) for a, b in zip(step(loss, entry, torch.float64), eager, strict=True))
