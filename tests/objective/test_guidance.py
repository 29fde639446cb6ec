"""Guidance inside the target: of one scale, and of a range of scales that the network is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from support.central_differences import central_tangent, column
from support.small_networks import batch, network
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from mmf_fast import Adapter, Dual, Guidance, MeanFlowLoss, TimeSampler, preset, sample
from mmf_fast.models import MLP, DiT, UNet
from mmf_fast.objective import BatchShare
from mmf_fast.objective.streams import GlobalStream

pytestmark = pytest.mark.filterwarnings("ignore:conditional tangents")

RANGES = Guidance(omega=(1.0, 8.0), t_min=(0.0, 0.5), t_max=(0.5, 1.0), dropout=0.0)


class Listening(nn.Module):
    """A network, and what it was told at each call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.heard = inner, []

    def forward(self, z: Any, r: Any, t: Any, y: Any, omega: Any, t_min: Any, t_max: Any) -> Any:
        self.heard.append((omega, t_min, t_max, isinstance(z, Dual)))
        return self.inner(z, r, t, y, omega=omega, t_min=t_min, t_max=t_max)


def guided_dit() -> nn.Module:
    """Told its guidance, with weights that leave no branch at zero, in float64."""
    torch.manual_seed(0)
    net = DiT(4, channels=2, patch_size=2, width=8, depth=2, heads=2, num_classes=3, guided=True).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


# ---- one scale -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tangent", ["predicted", "conditional"])
@pytest.mark.parametrize("kappa", [0.0, 0.4])
def test_guidance_inside_the_target(tangent: str, kappa: float) -> None:
    net = network("dit", num_classes=3)
    x, noise, (r, t) = batch("dit", size=6, instants=2)
    y = torch.tensor([0, 1, 2, 0, 3, 3])  # 3 is the null label: those rows keep v
    guidance = Guidance(omega=1.5, kappa=kappa, t_min=0.3, t_max=0.9, dropout=0.0)
    output = MeanFlowLoss(net, tangent=tangent, guidance=guidance, p=0.0)(x, noise=noise, times=(r, t), y=y)
    with torch.no_grad():
        v = noise - x
        z = x + column(t, x) * v
        u_class, u_null = net(z, t, t, y), net(z, t, t, torch.full_like(y, 3))
        guided = 1.5 * v + kappa * u_class + (1 - 1.5 - kappa) * u_null
        target = torch.where(column((t >= 0.3) & (t <= 0.9) & (y != 3), v), guided, v)
        w = u_class if tangent == "predicted" else target
        du = central_tangent(lambda z, r, t: net(z, r, t, y), z, r, t, w)
        error = net(z, r, t, y) + column(t - r, v) * du - target
    torch.testing.assert_close(output.per_sample, error.flatten(1).square().sum(1), rtol=1e-8, atol=0)


def test_class_dropout_replaces_labels_by_the_null_label() -> None:
    net = network("mlp", num_classes=3)
    x, noise, times = batch("mlp")
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    dropped = MeanFlowLoss(net, guidance=Guidance(omega=2.0, dropout=1.0))(x, noise=noise, times=times, y=y)
    null = MeanFlowLoss(net)(x, noise=noise, times=times, y=torch.full_like(y, 3))
    torch.testing.assert_close(dropped.loss, null.loss, rtol=1e-14, atol=0)
    y, null_label = torch.zeros(10_000, dtype=torch.int64), torch.tensor(3)
    labels = Guidance(dropout=0.1).drop({"y": y}, {"y": null_label}, torch.rand(10_000))["y"]
    assert (labels == 3).double().mean() == pytest.approx(0.1, abs=0.012)


def test_labels_of_a_narrow_dtype_have_their_null_label_too() -> None:
    """256 classes fit into uint8, their null label does not: it once became class 0."""
    seen = []

    def net(z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return z

    y = torch.arange(8, dtype=torch.uint8)
    MeanFlowLoss(net, guidance=Guidance(omega=2.0, dropout=1.0), null_label=256)(torch.randn(8, 2), y=y)
    assert all((each == 256).all() for each in seen)


@pytest.mark.parametrize("guidance", [Guidance(omega=2.0), RANGES], ids=["one scale", "a range"])
def test_conditions_may_lie_in_memory_as_they_like(guidance: Guidance) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 3, 3, padding=1).double()

        def forward(self, z: Any, r: Any, t: Any, image: Any, **told: Any) -> Any:
            return self.conv(torch.cat([z, image], 1))

    loss_fn = MeanFlowLoss(Net(), guidance=guidance, null={"image": torch.zeros(3, 1, 1)}, p=0.0)
    x, noise, image = torch.randn(3, 4, 3, 5, 5).double()
    image[1] = 0  # one row has no condition
    times = torch.full((4,), 0.3).double(), torch.full((4,), 0.6).double()
    losses = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        losses.append(loss_fn(x, noise=noise, times=times, image=image.to(memory_format=layout)).per_sample)
    torch.testing.assert_close(losses[0], losses[1])


# ---- a range of scales -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tangent", ["predicted", "conditional"])
def test_the_target_of_a_row_has_the_scale_that_the_network_is_told(tangent: str) -> None:
    """v_target = v + (1 - 1 / omega) (u(c) - u(null)) in [t_min, t_max], with numbers read off the network's calls."""
    inner = guided_dit()
    net = Listening(inner)
    x, noise, (r, t) = batch("dit", size=9, instants=0)
    y = torch.arange(9) % 4  # 3 is the null label: those rows keep v
    loss_fn = MeanFlowLoss(net, tangent=tangent, guidance=RANGES, p=0.0, null_label=3)
    output = loss_fn(x, noise=noise, times=(r, t), y=y)
    omega, t_min, t_max, _ = net.heard[-1]
    for call in net.heard:
        assert all(torch.equal(a, b) for a, b in zip(call[:3], (omega, t_min, t_max), strict=True))
    assert (omega >= 1).all() and omega.max() > 1.5
    applies = (t >= t_min) & (t <= t_max) & (y != 3)
    assert applies.any() and not applies[y != 3].all()
    with torch.no_grad():
        told = {"omega": omega, "t_min": t_min, "t_max": t_max}
        v = noise - x
        z = x + column(t, x) * v
        u_class, u_null = inner(z, t, t, y, **told), inner(z, t, t, torch.full_like(y, 3), **told)
        guided = v + column(1 - 1 / omega, v) * (u_class - u_null)
        target = torch.where(column(applies, v), guided, v)
        w = u_class if tangent == "predicted" else target
        du = central_tangent(lambda z, r, t: inner(z, r, t, y, **told), z, r, t, w)
        error = inner(z, r, t, y, **told) + column(t - r, v) * du - target
    torch.testing.assert_close(output.per_sample, error.flatten(1).square().sum(1), rtol=1e-8, atol=0)


class ClassGaussians(nn.Module):
    """Class c is N(c, 1/4), c = -1, 1; label 2 is none. theta = 1: the exact velocity of the field of scale omega.

    Of N(m, s^2): E[v | z] = (t - (1 - t) s^2) / (t^2 + (1 - t)^2 s^2) (z - (1 - t) m) - m.
    """

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor, omega: Tensor) -> Tensor:
        t = t[:, None]
        variance = 0.25 * (1 - t) ** 2 + t**2
        rate = (t - 0.25 * (1 - t)) / variance
        m = torch.tensor([[-1.0], [1.0]], dtype=z.dtype)[:, None]  # (2, 1, 1), against (B, 1)
        velocity = rate * (z - (1 - t) * m) - m
        density = torch.softmax(-((z - (1 - t) * m) ** 2) / (2 * variance), dim=0)
        v_null = (density * velocity).sum(0)
        v_class = torch.where((y == 2)[:, None], v_null, velocity[y.clamp_max(1), torch.arange(len(y))])
        return self.theta * (v_null + omega[:, None] * (v_class - v_null))


def test_the_minimiser_is_the_guided_field_of_every_scale() -> None:
    """At the exact field of v_null + omega (v_c - v_null), in closed form, the expected gradient of the loss is zero;
    with a field a tenth too large it is not."""
    net = ClassGaussians()
    loss_fn = MeanFlowLoss(net, guidance=Guidance(omega=(1.0, 5.0), dropout=0.2), null_label=2, p=0.0)
    found: dict[float, list[float]] = {1.0: [], 1.1: []}
    for seed in range(40):
        torch.manual_seed(seed)
        y = torch.arange(4000) % 2
        x = 2.0 * y[:, None] - 1 + 0.5 * torch.randn(4000, 1, dtype=torch.float64)
        t = torch.rand(4000, dtype=torch.float64)
        for theta, gradients in found.items():
            net.theta.data.fill_(theta)
            loss = loss_fn(x, noise=torch.randn_like(x), times=(t, t), y=y).loss
            gradients.append(float(torch.autograd.grad(loss, net.theta)[0]))
    mean, error = torch.tensor(found[1.0]).mean(), torch.tensor(found[1.0]).std() / 40**0.5
    assert abs(mean) < 4 * error
    assert torch.tensor(found[1.1]).mean() > 10 * error


def test_scales_and_limits_have_their_laws() -> None:
    cond = RANGES.tell({"y": torch.zeros(1)}, GlobalStream(20_000, dtype=torch.float64))
    assert set(cond) == {"y", "omega", "t_min", "t_max"}
    laws = {
        "omega": stats.loguniform(1, 8), "t_min": stats.uniform(0, 0.5), "t_max": stats.uniform(0.5, 0.5),
    }  # fmt: skip
    for name, law in laws.items():
        assert stats.kstest(cond[name].numpy(), law.cdf).pvalue > 1e-3
    assert set(Guidance(omega=(1, 4)).tell({}, GlobalStream(3))) == {"omega"}
    assert Guidance(omega=2.0).tell({}, GlobalStream(3)) == {}


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_partners_share_their_guidance(lam: float) -> None:
    net = Listening(guided_dit())
    loss_fn = MeanFlowLoss(net, times=TimeSampler(share=0.5), lam=lam, paired=True, guidance=RANGES, null_label=3)
    loss_fn(torch.randn(16, 2, 4, 4).double(), y=torch.arange(16) % 3)
    now, nothing, later = net.heard  # u(z, t, t | c), u(z, t, t | null), and the intervals
    assert [call[-1] for call in net.heard] == [False, False, True]
    for of_now, of_null, of_later in zip(now[:3], nothing[:3], later[:3], strict=True):
        assert of_now.unique().numel() == 8
        assert torch.equal(of_now.sort().values, of_later.sort().values)
        assert torch.equal(of_null, torch.cat([of_now, of_later]))


def test_parts_of_a_batch_draw_the_guidance_of_the_whole() -> None:
    net = guided_dit()
    x, y = torch.randn(16, 2, 4, 4).double(), torch.arange(16) % 3
    guidance = Guidance(omega=(1.0, 8.0), t_min=(0.0, 0.5), t_max=(0.5, 1.0), dropout=0.3)
    loss_fn = MeanFlowLoss(net, times=TimeSampler(share=0.5), lam=0.5, paired=True, guidance=guidance)

    def losses(index: int, count: int) -> Tensor:
        rows = slice(index * 16 // count, (index + 1) * 16 // count)
        torch.rand(1)
        return loss_fn(x[rows], step=7, part=BatchShare(index, count, seed=3), y=y[rows]).per_sample

    parts = torch.cat([losses(index, 4) for index in range(4)])
    torch.testing.assert_close(parts, losses(0, 1), rtol=1e-12, atol=0)


def test_it_compiles_to_one_graph() -> None:
    net = guided_dit()
    loss_fn, compiled = (MeanFlowLoss(net, **preset("imf"), guidance=RANGES) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=counter)
    x, y = torch.randn(8, 2, 4, 4).double(), torch.arange(8) % 3
    for step in range(3):
        losses = []
        for each in (loss_fn, compiled):
            output = each(x, step=step, part=BatchShare(seed=1), y=y)
            gradient = torch.autograd.grad(output.loss, list(net.parameters()))
            losses.append(torch.cat([output.per_sample, *(g.flatten() for g in gradient)]))
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-12)
    assert counter.frame_count == 1


# ---- networks that are told ------------------------------------------------------------------------------------------

NETWORKS = {
    "mlp": lambda **more: MLP(3, width=8, depth=1, **more),
    "dit": lambda **more: DiT(4, 2, 2, width=8, depth=1, heads=2, **more),
    "sequence": lambda **more: DiT(6, 2, 3, width=8, depth=1, heads=2, dims=1, **more),
    "unet": lambda **more: UNet(4, 2, 8, (1, 2), 1, (), **more),
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_numbers_are_tensors_for_all_rows_and_no_guidance_is_omega_one(kind: str, context_dim: int) -> None:
    net = NETWORKS[kind](num_classes=3, guided=True, context_dim=context_dim)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    z, t = torch.randn(4, *net.shape), torch.rand(4)
    given = {"y": torch.arange(4) % 3} | ({"context": torch.randn(4, 2)} if context_dim else {})
    of_numbers = net(z, 0.5 * t, t, **given, omega=2.5, t_max=0.8)
    of_tensors = net(
        z, 0.5 * t, t, **given, omega=torch.full((4,), 2.5), t_min=torch.zeros(4), t_max=torch.full((4,), 0.8)
    )
    torch.testing.assert_close(of_numbers, of_tensors, rtol=0, atol=0)
    nothing = net(z, 0.5 * t, t, **given)
    torch.testing.assert_close(nothing, net(z, 0.5 * t, t, **given, omega=1.0, t_min=0.0, t_max=1.0), rtol=0, atol=0)
    for one_off in ({"omega": 2.6}, {"t_min": 0.1}, {"t_max": 0.7}):
        assert not torch.allclose(of_numbers, net(z, 0.5 * t, t, **given, **{"omega": 2.5, "t_max": 0.8} | one_off))
    with pytest.raises(ValueError, match="build it with guided=True"):
        NETWORKS[kind]()(z, t, t, omega=2.0)


def test_a_network_of_ones_own_is_told_by_name() -> None:
    """Called net(z, t, h, omega, t_min, t_max, y), as those of iMF are."""
    heard = []

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, z: Any, t: Any, h: Any, omega: Any, t_min: Any, t_max: Any, y: Any) -> Any:
            heard.append((omega, t_min, t_max))
            return self.fc(z) * omega[:, None]

    net = Adapter(Theirs(), lambda net, z, r, t, **c: net(z, t, t - r, **c))
    MeanFlowLoss(net, guidance=RANGES, null_label=3)(torch.randn(8, 2), y=torch.arange(8) % 3).loss.backward()
    assert all(x.shape == omega.shape for omega, *limits in heard for x in limits)
    heard.clear()
    x = sample(net, (4, 2), y=torch.zeros(4), omega=2, t_min=0.0, t_max=torch.ones(4))
    assert torch.isfinite(x).all()
    assert [told.tolist() for told in heard[0]] == [[2.0] * 4, [0.0] * 4, [1.0] * 4]
    with pytest.raises(ValueError, match="omega is 0: a scale of guidance is 1"):
        sample(net, (4, 2), y=torch.zeros(4), omega=0)


REFUSED = {
    "below one": (lambda: Guidance(omega=(0.5, 8)), r"guidance.omega is \(0.5, 8\): .* from 1 or more"),
    "falling": (lambda: Guidance(omega=(8, 1)), "must rise"),
    "infinite": (lambda: Guidance(omega=(1, float("inf"))), "must rise"),
    "kappa": (lambda: Guidance(omega=(1, 8), kappa=0.5), "leave it out"),
    "limits alone": (lambda: Guidance(t_max=(0.5, 1)), "guidance.t_max is a range: so must guidance.omega be"),
    "three": (lambda: Guidance(omega=[1, 8, 9]), "a range is a pair"),
    "crossing": (lambda: Guidance(omega=(1, 8), t_min=(0, 0.6), t_max=(0.5, 1)), "must rise within"),
    "not told": (
        lambda: MeanFlowLoss(lambda z, r, t, y: z, guidance=RANGES, null_label=3), "no condition omega, by which",
    ),
    "given too": (
        lambda: MeanFlowLoss(guided_dit(), guidance=RANGES)(
            torch.randn(3, 2, 4, 4), y=torch.arange(3), omega=torch.ones(3)
        ),
        "the loss draws it; leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
