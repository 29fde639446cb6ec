"""How the field trains MeanFlow today, written from the descriptions of public code, as losses to time beside ours.

    forward_mode        py-meanflow: torch.func.jvp of the network, gradients flowing through it
    second_forward      zhuyu-cs/MeanFlow: u by an ordinary forward, du/dt by a second pass of torch.func.jvp without
                        gradients; only lambda = 0
    double_backward     haidog-yaqub, primepake: torch.autograd.functional.jvp, the double-backward trick
    finite_differences  TiM (arXiv 2509.04394): du/dt from two more evaluations without gradients; only lambda = 0

All of them pass the whole batch through the derivative, use the conditional tangent, and need attention written out
(sdpa_kernel(MATH)): PyTorch's fused kernels have neither a forward derivative nor a second backward. Draws, weight and
residual are those of mmf_fast, so equal seeds give equal losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmf_fast import TimeSampler
from mmf_fast.contract import per_sample
from mmf_fast.objective.draws import BatchShare, Points, arrange, column, draw_kinds, given_kinds
from mmf_fast.objective.loss import LossOutput
from mmf_fast.objective.streams import GlobalStream

Velocity = Callable[[Tensor, Tensor], Tensor]
STEP = 0.005  # of the finite differences, TiM's


def forward_mode(u: Velocity, z: Tensor, t: Tensor, v: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        value, derivative = torch.func.jvp(u, (z, t), (v, torch.ones_like(t)))  # type: ignore[misc]  # two without has_aux
    return value, derivative if exact else derivative.detach()


def second_forward(u: Velocity, z: Tensor, t: Tensor, v: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    value = u(z, t)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        derivative = torch.func.jvp(u, (z, t), (v, torch.ones_like(t)))[1]
    return value, derivative


def double_backward(u: Velocity, z: Tensor, t: Tensor, v: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        value, derivative = torch.autograd.functional.jvp(u, (z, t), (v, torch.ones_like(t)), create_graph=True)
    return value, derivative if exact else derivative.detach()


def finite_differences(u: Velocity, z: Tensor, t: Tensor, v: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    value = u(z, t)
    with torch.no_grad():
        derivative = (u(z + STEP * v, t + STEP) - u(z - STEP * v, t - STEP)) / (2 * STEP)
    return value, derivative


WAYS: dict[str, Callable[[Velocity, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]] = {
    "torch.func.jvp": forward_mode,
    "second forward": second_forward,
    "double backward": double_backward,
    "finite differences": finite_differences,
}


class FieldLoss(nn.Module):
    """The MeanFlow loss of net(z, r, t, y=None) by one of WAYS, called as MeanFlowLoss is.

    exact: whether gradients flow through du/dt (lambda = 1) or not (lambda = 0).  p, c: as in MeanFlowLoss.
    """

    def __init__(
        self, net: nn.Module, way: str, times: TimeSampler, exact: bool = False, p: float = 1.0, c: float = 1e-3
    ) -> None:
        super().__init__()
        self.net, self.pair, self.times, self.exact, self.p, self.c = net, WAYS[way], times, exact, p, c

    def forward(self, x: Tensor, *, step: int = 0, y: Tensor | None = None, **given: Any) -> LossOutput:
        """given: noise and times, drawn when absent."""
        cond = {} if y is None else {"y": y}
        stream = GlobalStream(len(x), x.device, x.dtype, x.shape[1:])
        if given.get("times") is None:
            kinds = draw_kinds(len(x), BatchShare(), step, self.times.intervals(len(x), step), 0, paired=False)
            r, t = self.times.draw(stream)
        else:
            r, t = given["times"]
            kinds = given_kinds(r, t, 0, paired=False)
        noise = stream.noise() if given.get("noise") is None else given["noise"]
        d, _ = arrange(x, noise, r, t, cond, per_sample(cond, len(x)), kinds)
        losses = self._compute(*d.on_path())
        return LossOutput(losses.mean(), losses.detach(), {})

    def compile(self, **kwargs: Any) -> None:
        self._compute = torch.compile(self._compute, dynamic=False, **kwargs)  # type: ignore[method-assign]

    def _compute(self, points: Points, v: Tensor) -> Tensor:
        z, r, t, cond = points[:4]
        u, du = self.pair(lambda z, t: self.net(z, r, t, **cond), z, t, v, self.exact)
        square = (u + column(t - r, u) * du - v).square().flatten(1).sum(1)
        return square * (square.detach() + self.c) ** -self.p
