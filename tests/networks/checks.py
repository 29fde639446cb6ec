"""What a network must show to count, each against something independent of Duals."""

from __future__ import annotations

import copy
from collections.abc import Callable

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
    for module in net.modules():
        if isinstance(vars(module).get("dtype"), torch.dtype):  # guided-diffusion's UNets hold it themselves
            module.dtype = dtype
    return net.to(dtype)


def point(entry: Entry, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """z, r, t and the direction w of z; that of t is 1."""
    generator = torch.Generator().manual_seed(1)
    z, w = (torch.randn(batch, *entry.shape, generator=generator).to(dtype) for _ in range(2))
    t = torch.linspace(0.4, 0.9, batch, dtype=dtype)
    return z, 0.3 * t, t, w


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def derivative(net: nn.Module, z: Tensor, r: Tensor, t: Tensor, w: Tensor, mode: str = "dual") -> tuple[Tensor, Tensor]:
    """u and du/dt along (w, 0, 1)."""
    return jvp(lambda z, t: net(z, r, t), (z, t), (w, torch.ones_like(t)), mode=mode)


def gradients(net: nn.Module, y: Tensor) -> Tensor:
    parameters = [p for p in net.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
    )


def quotient(f: Callable[[float], Tensor], h: float) -> Tensor:
    """f'(0) = (8 (f(h) - f(-h)) - f(2h) + f(-2h)) / 12h, whose error is of order h^4."""
    return (8 * (f(h) - f(-h)) - f(2 * h) + f(-2 * h)) / (12 * h)


def exactness(entry: Entry) -> float:
    """Primal, tangent and the gradient through the tangent, relative to plain forwards and backwards at shifted points.

    Many networks compute their embedding of time in float32, whatever their dtype, and differences see its rounding:
    these are measured against torch.func.jvp, which sees the same float32.
    """
    net = build(entry)
    z, r, t, w = point(entry)
    c = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(2))

    def through(mode: str) -> tuple[Tensor, Tensor]:
        u, du = derivative(net, z, r, t, w, mode)
        return u.detach(), torch.cat([du.detach().flatten(), gradients(net, (c * du).sum())])

    def shifted(h: float) -> Tensor:
        y = net(z + h * w, r, t + h)
        return torch.cat([y.detach().flatten(), gradients(net, (c * y).sum())])

    def error(found: Tensor, right: Tensor) -> float:
        n = z.numel()
        return max(relative(found[:n], right[:n]), relative(found[n:], right[n:]))

    u, found = through("dual")
    with torch.no_grad():
        primal = relative(u, net(z, r, t))
    derived = error(found, quotient(shifted, 1e-5))
    return max(primal, derived if derived < 1e-6 else error(found, through("func")[1]))


def loss_of(net: nn.Module) -> MeanFlowLoss:
    return MeanFlowLoss(net, times=TimeSampler(share=0.5), lam=LambdaSchedule(value=0.5), paired=True)


def step(loss: MeanFlowLoss, entry: Entry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss of a fixed batch, and its gradient."""
    generator = torch.Generator().manual_seed(3)
    x, noise = (torch.randn(BATCH, *entry.shape, generator=generator).to(dtype) for _ in range(2))
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
    state = copy.deepcopy(net.state_dict())
    z, r, t, w = point(entry)

    def at(shift: float) -> tuple[Tensor, Tensor]:
        net.load_state_dict(state)  # batch and spectral norm change their buffers
        torch.manual_seed(5)
        return derivative(net, z + shift * w, r, t + shift, w)

    return relative(at(0.0)[1], quotient(lambda h: at(h)[0], 1e-4))


def in_bf16(entry: Entry) -> tuple[float, float]:
    """How far du/dt and torch.func's du/dt under autocast are from that in float64."""
    net, (z, r, t, w) = build(entry, torch.float32), point(entry, dtype=torch.float32)

    def under_autocast(mode: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            du = derivative(net, z, r, t, w, mode)[1]
            u = net(z, r, t)
        # PyTorch's gradient of a bfloat16 kernel of 3 x 1 x 1 is memory that nothing has written, of conv3d alone too.
        sure = nn.ParameterList(p for p in net.parameters() if p.ndim < 5)
        assert gradients(sure, u.float().sum()).isfinite().all() and gradients(sure, du.float().sum()).isfinite().all()
        return du.detach()

    found = under_autocast("dual")
    try:
        other = under_autocast("func")
    except (NotImplementedError, RuntimeError):  # it does not serve every network
        other = found
    right = derivative(build(entry), *(x.double() for x in (z, r, t, w)))[1]
    return relative(found, right), relative(other, right)


def compiled(entry: Entry, backend: str = "aot_eager") -> float:
    """The compiled step, whole, against the eager one."""
    torch._dynamo.reset()
    loss = loss_of(build(entry))
    eager = step(loss, entry, torch.float64)
    loss.compile(backend=backend)
    return max(relative(a, b) for a, b in zip(step(loss, entry, torch.float64), eager, strict=True))


def compiled_alone(entry: Entry) -> Tensor:
    """The network itself, on tensors: what does not compile so cannot as a Dual."""
    torch._dynamo.reset()
    net, (z, r, t, _) = build(entry), point(entry)
    return torch.compile(net, backend="eager", fullgraph=True)(z, r, t)
