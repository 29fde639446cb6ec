"""Distillation: the velocity of a trained field in place of that of a sample."""

from __future__ import annotations

import copy

import pytest
import torch
from support.small_networks import batch, network
from torch import Tensor, nn

from mmf_fast import Adapter, MeanFlowLoss, TimeSampler

MEAN, STD = 1.5, 0.3


class Spread(nn.Module):
    """s_t = sqrt((1 - t)^2 STD^2 + t^2), the deviation of z_t on the path from N(MEAN, STD^2) to N(0, 1)."""

    def forward(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * STD**2 + t**2).sqrt()


class Exact(nn.Module):
    """The average velocity of that path in closed form, u(z, r, t) = (z - X(z)) / (t - r), and its limit at r = t."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = Spread()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        r, t = r[:, None], t[:, None]
        s_r, s_t = self.spread(r), self.spread(t)
        from_mean = z - (1 - t) * MEAN
        # s_r / s_t = 1 - (t - r) slope, so no difference of near numbers is divided by t - r
        slope = (-(2 - r - t) * STD**2 + r + t) / (s_t * (s_t + s_r))
        return self.scale * (slope * from_mean - MEAN)


def path(size: int = 64) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = MEAN + STD * torch.randn(size, 2, dtype=torch.float64, generator=generator)
    noise = torch.randn(size, 2, dtype=torch.float64, generator=generator)
    r, t = torch.rand(2, size, dtype=torch.float64, generator=generator).sort(0).values
    r[: size // 4] = t[: size // 4]
    return x, noise, (r, t)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_at_the_exact_average_velocity_no_row_has_an_error_left(lam: float) -> None:
    """A sample's own velocity has a variance; the teacher's has none, and biases at no lambda."""
    x, noise, times = path()
    taught = MeanFlowLoss(Exact(), teacher=Exact(), tangent="conditional", lam=lam, p=0.0)
    out = taught(x, noise=noise, times=times)
    assert out.per_sample.max() < 1e-24
    alone = MeanFlowLoss(Exact(), p=0.0)(x, noise=noise, times=times)
    assert alone.per_sample.mean() > 0.1


def test_the_target_and_the_tangent_are_those_of_the_teacher() -> None:
    """With a network that is wrong: by central differences along the teacher's velocity."""
    x, noise, (r, t) = path()
    net, teacher = network("mlp").double(), Exact()
    x, noise = (torch.cat([each, each[:, :1]], 1) for each in (x, noise))
    teacher_of = copy.deepcopy(teacher)

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.exact = teacher

        def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
            return self.exact(z, r, t)

    out = MeanFlowLoss(net, teacher=Padded(), tangent="conditional", p=0.0)(x, noise=noise, times=(r, t))
    with torch.no_grad():
        z = (1 - t[:, None]) * x + t[:, None] * noise
        v, h = teacher_of(z, t, t), 1e-5
        du = (net(z + h * v, r, t + h) - net(z - h * v, r, t - h)) / (2 * h)
        error = net(z, r, t) + (t - r)[:, None] * du - v
    torch.testing.assert_close(out.per_sample, error.square().sum(1), rtol=1e-7, atol=1e-9)


def test_it_is_frozen_moved_and_no_part_of_the_module() -> None:
    net, teacher = network("mlp"), network("mlp").float().train()
    loss_fn = MeanFlowLoss(net, teacher=teacher, tangent="conditional").double().train()
    assert not teacher.training and not any(each.requires_grad for each in teacher.parameters())
    assert all(each.dtype == torch.float64 for each in teacher.parameters())
    assert {id(each) for each in loss_fn.parameters()} == {id(each) for each in net.parameters()}
    assert not any("teacher" in name for name in loss_fn.state_dict())
    before = [each.clone() for each in teacher.parameters()]
    loss_fn(batch("mlp")[0]).loss.backward()
    assert all(map(torch.equal, before, teacher.parameters()))


def test_it_costs_one_forward_and_compiles() -> None:
    net, x = network("mlp"), batch("mlp", size=8)[0]
    options = {"tangent": "conditional", "lam": 1.0, "times": TimeSampler(share=0.5), "teacher": network("mlp")}
    loss_fn = MeanFlowLoss(net, **options)
    assert loss_fn.forwards(8) == 8 * (0.5 * 3 + 0.5 * 6 + 1)
    torch.manual_seed(0)
    want = loss_fn(x).loss
    loss_fn.compile(backend="aot_eager")
    torch.manual_seed(0)
    torch.testing.assert_close(loss_fn(x).loss, want, rtol=1e-12, atol=0)


def test_what_does_not_fit_is_named() -> None:
    from mmf_fast import Guidance

    net = network("mlp", num_classes=3)
    for teacher in (net, Adapter(net, lambda net, z, r, t: net(z, r, t))):
        with pytest.raises(ValueError, match="trained together, but a teacher is frozen: give copy.deepcopy"):
            MeanFlowLoss(net, teacher=teacher)
    with pytest.raises(ValueError, match="teacher and guidance do not go together"):
        MeanFlowLoss(net, teacher=copy.deepcopy(net), guidance=Guidance(omega=2.0))
    with pytest.raises(ValueError, match="not as u"):
        MeanFlowLoss(net, teacher=lambda z, t: z)
