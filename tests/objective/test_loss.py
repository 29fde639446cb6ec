"""The loss and its gradient against central differences and against formulas written out here, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.central_differences import central_tangent, column
from support.small_networks import KINDS, batch, network, sample_shape
from torch import Tensor, nn

from mmf_fast import Dual, Guidance, LambdaSchedule, MeanFlowLoss, TimeSampler, preset, sg_lambda
from mmf_fast.objective import BatchShare
from mmf_fast.ops import native

pytestmark = pytest.mark.filterwarnings("ignore:conditional tangents")


def gradients(loss_fn: MeanFlowLoss, *args: Any, **kwargs: Any) -> list[Tensor]:
    parameters = list(loss_fn.net.parameters())
    grads = torch.autograd.grad(loss_fn(*args, **kwargs).loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def close(a: list[Tensor], b: list[Tensor], tolerance: float) -> bool:
    """Relative to the whole gradient, as parameters may have none."""
    error = sum((x - y).square().sum() for x, y in zip(a, b, strict=True)).sqrt()
    return bool(error <= tolerance * sum(y.square().sum() for y in b).sqrt())


class Surrogate:
    """The loss with everything behind a stopgrad frozen at the present parameters: its derivative is the gradient."""

    def __init__(
        self, net: nn.Module, x: Tensor, noise: Tensor, times: Any, lam: float, tangent: str, p: float, c: float
    ):
        self.net, self.lam = net, lam
        self.r, self.t = times
        self.target = noise - x
        self.z = (1 - column(self.t, x)) * x + column(self.t, x) * noise
        self.w = self.net(self.z, self.t, self.t) if tangent == "predicted" else self.target
        self.frozen = central_tangent(net, self.z, self.r, self.t, self.w)
        self.weight = torch.ones(())
        square = self.square()
        self.weight = 1 / (square + c) ** p

    def square(self) -> Tensor:
        moving = central_tangent(self.net, self.z, self.r, self.t, self.w)
        du = self.lam * moving + (1 - self.lam) * self.frozen
        e = self.net(self.z, self.r, self.t) + column(self.t - self.r, du) * du - self.target
        return e.flatten(1).square().sum(1)

    def __call__(self) -> Tensor:
        return (self.weight * self.square()).mean()


def directional(
    function: Callable[[], Tensor], parameters: list[Tensor], direction: list[Tensor], h: float = 1e-4
) -> Tensor:
    """Fourth-order central difference of a function of the parameters."""
    origin = [p.clone() for p in parameters]

    def at(k: int) -> Tensor:
        for p, o, d in zip(parameters, origin, direction, strict=True):
            p.copy_(o + k * h * d)
        return function()

    value = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
    at(0)
    return value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tangent", ["predicted", "conditional"])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_gradient_agrees_with_central_differences(kind: str, tangent: str, lam: float) -> None:
    net = network(kind)
    x, noise, times = batch(kind)
    loss_fn = MeanFlowLoss(net, lam=lam, tangent=tangent, p=0.75, c=0.1)
    output = loss_fn(x, noise=noise, times=times)
    grads = torch.autograd.grad(output.loss, list(net.parameters()), allow_unused=True)
    direction = [torch.randn_like(p) for p in net.parameters()]
    ours = sum((g * d).sum() for g, d in zip(grads, direction, strict=True) if g is not None)
    with torch.no_grad():
        surrogate = Surrogate(net, x, noise, times, lam, tangent, p=0.75, c=0.1)
        torch.testing.assert_close(output.loss.detach(), surrogate(), rtol=1e-8, atol=0)
        torch.testing.assert_close(output.per_sample, surrogate.weight * surrogate.square(), rtol=1e-7, atol=0)
        theirs = directional(surrogate, list(net.parameters()), direction)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tangent", ["predicted", "conditional"])
def test_func_mode_agrees(kind: str, lam: float, tangent: str) -> None:
    net = network(kind)
    x, noise, times = batch(kind)
    ours, theirs = (
        gradients(MeanFlowLoss(net, lam=lam, tangent=tangent, jvp=mode), x, noise=noise, times=times)
        for mode in ("dual", "func")
    )
    assert close(ours, theirs, 1e-12)


def test_finite_difference_mode_is_close() -> None:
    net = network("mlp")
    x, noise, times = batch("mlp")
    ours, theirs = (
        gradients(MeanFlowLoss(net, lam=0.5, jvp=mode), x, noise=noise, times=times)
        for mode in ("dual", "finite_difference")
    )
    assert close(theirs, ours, 1e-2)
    assert not close(theirs, ours, 1e-7)  # it is biased by its step: a test that cannot see the bias sees nothing


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_zero_is_meanflow(kind: str) -> None:
    """The published MeanFlow loss: jvp, then stopgrad on the whole target."""
    net = network(kind)
    x, noise, (r, t) = batch(kind)
    v = noise - x
    z = x + column(t, x) * v
    u, du = torch.func.jvp(lambda z, t: net(z, r, t), (z, t), (v, torch.ones_like(t))) if kind == "mlp" else (
        net(z, r, t), central_tangent(net, z, r, t, v).detach(),
    )  # fmt: skip
    error = u - (v - column(t - r, v) * du).detach()
    square = error.flatten(1).square().sum(1)
    loss = (square / (square.detach() + 1e-3)).mean()
    theirs = list(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))
    theirs = [torch.zeros_like(p) if g is None else g for p, g in zip(net.parameters(), theirs, strict=True)]
    ours = gradients(MeanFlowLoss(net, lam=0.0, tangent="conditional"), x, noise=noise, times=(r, t))
    assert close(ours, theirs, 1e-13 if kind == "mlp" else 1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_r_equal_t_is_flow_matching(kind: str, lam: float) -> None:
    net = network(kind)
    x, noise, (_, t) = batch(kind)
    z = (1 - column(t, x)) * x + column(t, x) * noise
    loss = (net(z, t, t) - (noise - x)).square().flatten(1).sum(1).mean()
    theirs = [g for g in torch.autograd.grad(loss, list(net.parameters()))]
    ours = gradients(MeanFlowLoss(net, lam=lam, p=0.0), x, noise=noise, times=(t, t))
    assert close(ours, theirs, 1e-13)


@pytest.mark.parametrize("paired", [False, True])
def test_before_their_start_intervals_are_instants(paired: bool) -> None:
    """The loss of flow matching up to the step before, and that of the same law without a start from there on."""
    net, x = network("mlp"), batch("mlp", size=8)[0]

    def loss(times: TimeSampler, step: int) -> Tensor:
        return MeanFlowLoss(net, times=times, lam=1.0, paired=paired)(x, step=step, part=BatchShare(seed=5)).loss

    first, always, never = TimeSampler(share=0.5, start=3), TimeSampler(share=0.5), TimeSampler(share=0.0)
    assert loss(first, 2) == loss(never, 2) != loss(always, 2)
    assert loss(first, 3) == loss(always, 3) != loss(never, 3)


def test_the_value_does_not_depend_on_lambda() -> None:
    net = network("dit")
    x, noise, times = batch("dit")
    outputs = [MeanFlowLoss(net, lam=lam)(x, noise=noise, times=times) for lam in (0.0, 0.3, 1.0)]
    for output in outputs[1:]:
        torch.testing.assert_close(output.loss, outputs[0].loss, rtol=1e-14, atol=0)
    grads = [torch.autograd.grad(output.loss, list(net.parameters()))[5] for output in outputs]
    assert not torch.allclose(grads[0], grads[1], rtol=1e-3)
    # The gradient is affine in lambda: SG_0.3 = 0.7 SG_0 + 0.3 SG_1.
    torch.testing.assert_close(grads[1], 0.7 * grads[0] + 0.3 * grads[2], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("paired", [False, True])
def test_stochastic_lambda_has_the_expected_gradient(paired: bool) -> None:
    net = network("mlp")
    x, noise, (r, t) = batch("mlp", size=10, instants=5)
    times = (r, t)
    if paired:
        order = torch.argsort((r < t).int(), stable=True)  # partners share t, so that every draw is the same problem
        t[order[:5]] = r[order[:5]] = t[order[5:]]
    exact = torch.cat([g.flatten() for g in gradients(
        MeanFlowLoss(net, lam=0.4, paired=paired), x, noise=noise, times=times)])  # fmt: skip
    loss_fn = MeanFlowLoss(net, lam=0.4, paired=paired, stochastic=True)
    draws = torch.stack([
        torch.cat([g.flatten() for g in gradients(loss_fn, x, step=k, noise=noise, times=times)]) for k in range(400)
    ])  # fmt: skip
    deviation = (draws.mean(0) - exact).norm()
    standard_error = draws.var(0).sum().sqrt() / len(draws) ** 0.5
    assert standard_error > 0
    assert deviation < 2 * standard_error
    sg_0 = torch.cat([g.flatten() for g in gradients(
        MeanFlowLoss(net, lam=0.0, paired=paired), x, noise=noise, times=times)])  # fmt: skip
    assert (sg_0 - exact).norm() > 10 * standard_error  # the draws can tell lambda = 0.4 from lambda = 0


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_paired_rows_share_their_partner(lam: float) -> None:
    """Written out: u(z, t, t) of the r = t row is the tangent of the r < t row with the same x, noise and t."""
    net = network("dit", num_classes=3)
    x, noise, (r, t) = batch("dit", size=6, instants=3)
    y = torch.tensor([0, 1, 2, 0, 1, 3])
    order = torch.argsort((r < t).int(), stable=True)
    now, later = order[:3], order[3:]
    t[now] = t[later]
    r[now] = t[now]
    ours = gradients(MeanFlowLoss(net, lam=lam, paired=True), x, noise=noise, times=(r, t), y=y)
    x[later], noise[later], y[later] = x[now], noise[now], y[now]
    theirs = gradients(MeanFlowLoss(net, lam=lam, paired=False), x, noise=noise, times=(r, t), y=y)
    assert close(ours, theirs, 1e-13)


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_dropped_label_is_dropped_for_the_partner_too(stochastic: bool) -> None:
    """Otherwise the tangent of a row with a class would be the velocity of none."""
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
            seen.append(y)
            return z * 2.0

    loss_fn = MeanFlowLoss(Spy(), times=TimeSampler(share=0.5), lam=1.0, paired=True, stochastic=stochastic,
                           guidance=Guidance(dropout=0.5), null_label=9)  # fmt: skip
    for _ in range(20):
        seen.clear()
        loss_fn(torch.randn(16, 2), y=torch.arange(16) % 8)
        now, later = seen[0], torch.cat(seen[1:])
        assert now.sort().values.equal(later.sort().values) and (stochastic or now.equal(later))
    assert (now == 9).any() and (now != 9).any()


@pytest.mark.parametrize("weight", ["sample", "times"])
def test_noise_and_data_that_are_learned_have_the_derivative_of_the_loss(weight: str) -> None:
    """Whichever kernel serves: z and v are functions of both, so the target is no constant of them."""
    net = network("mlp")
    x, noise, times = batch("mlp", instants=6)
    loss_fn = MeanFlowLoss(net, p=0.0, weight=weight)
    learned = [x.clone().requires_grad_(), noise.clone().requires_grad_()]
    found = torch.autograd.grad(loss_fn(learned[0], noise=learned[1], times=times).loss, learned)
    for number, gradient in enumerate(found):
        step = torch.randn_like(x) * 1e-6
        above, below = ([x, noise] for _ in range(2))
        above[number], below[number] = above[number] + step, below[number] - step
        with torch.no_grad():
            difference = sum(k * loss_fn(a, noise=b, times=times).loss for k, (a, b) in ((1, above), (-1, below))) / 2
        torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-5, atol=1e-12)


def test_per_sample_losses_stand_in_the_order_of_the_data() -> None:
    net = network("mlp")
    x, noise, (r, t) = batch("mlp", size=7, instants=3)
    together = MeanFlowLoss(net, lam=0.5, stochastic=True)(x, noise=noise, times=(r, t))
    alone = [
        MeanFlowLoss(net, lam=0.5)(x[i : i + 1], noise=noise[i : i + 1], times=(r[i : i + 1], t[i : i + 1])).loss
        for i in range(7)
    ]
    torch.testing.assert_close(together.per_sample, torch.stack(alone).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(together.loss.detach(), together.per_sample.mean())


def test_only_the_rows_with_r_below_t_run_as_duals() -> None:
    calls: list[tuple[int, bool]] = []
    inner = network("mlp")

    def net(z: Any, r: Tensor, t: Any) -> Any:
        calls.append((z.shape[0], not isinstance(z, Dual)))
        return inner(z, r, t)

    MeanFlowLoss(net, times=TimeSampler(share=0.25), lam=1.0, paired=True)(torch.randn(8, 3, dtype=torch.float64))
    assert calls == [(6, True), (2, False)]
    calls.clear()
    MeanFlowLoss(net, times=TimeSampler(share=0.5), lam=0.5, stochastic=True)(
        torch.randn(8, 3, dtype=torch.float64), step=1
    )
    assert sum(rows for rows, plain in calls if not plain) == 4


@pytest.mark.parametrize(("p", "lam"), [(0.0, 0.0), (1.0, 0.3), (0.75, 1.0)])
def test_the_kernels_compute_the_formula_that_is_written_out(p: float, lam: float, monkeypatch: Any) -> None:
    if not native.available():
        pytest.skip(f"C++ kernels: {native.reason()}")
    net = network("mlp")
    x, noise, times = batch("mlp", size=9, instants=4)
    found = {}
    for kind in ("native", "reference"):
        monkeypatch.setenv("MMF_FAST_OPS", kind)
        loss_fn = MeanFlowLoss(net, lam=lam, p=p)
        output = loss_fn(x, noise=noise, times=times)
        found[kind] = [output.loss.detach(), output.per_sample, *gradients(loss_fn, x, noise=noise, times=times)]
    assert close(found["native"], found["reference"], 1e-13)


def test_stored_images_stand_for_minus_one_to_one() -> None:
    _, noise, times = batch("dit")
    stored = torch.randint(256, noise.shape, dtype=torch.uint8)
    loss_fn = MeanFlowLoss(network("dit"), lam=0.5)
    scaled = stored.to(noise.dtype) / 127.5 - 1
    values = [loss_fn(x, noise=noise.float(), times=times).loss for x in (stored, scaled.float())]
    torch.testing.assert_close(*values)


def test_sg_lambda() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = sg_lambda(x.sin(), 0.3)
    assert torch.equal(y, x.sin())
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, 0.3 * x.cos(), rtol=1e-14, atol=0)


def test_metrics() -> None:
    net = network("mlp")
    x, noise, (r, t) = batch("mlp", size=6, instants=2)
    lam = LambdaSchedule(kind="linear", warmup=10)
    metrics = MeanFlowLoss(net, lam=lam)(x, step=5, noise=noise, times=(r, t)).metrics
    assert set(metrics) == {"mse", "mse_instant", "mse_interval", "lam"}
    assert float(metrics["lam"]) == pytest.approx(0.5)
    unweighted = MeanFlowLoss(net, lam=lam, p=0)
    square = unweighted(x, step=5, noise=noise, times=(r, t)).per_sample
    assert float(metrics["mse_instant"]) == pytest.approx(float(square[r == t].mean()) / x[0].numel())
    assert float(metrics["mse_interval"]) == pytest.approx(float(square[r < t].mean()) / x[0].numel())
    assert float(metrics["mse"]) == pytest.approx(float(2 * metrics["mse_instant"] + 4 * metrics["mse_interval"]) / 6)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("objective", ["flow_matching", "meanflow", "imf", "mmf", "consistency"])
@pytest.mark.parametrize("kind", KINDS)
def test_presets_train(objective: str, kind: str) -> None:
    net = network(kind)
    loss_fn = MeanFlowLoss(net, **preset(objective))
    output = loss_fn(torch.randn(8, *sample_shape(kind), dtype=torch.float64), step=10_000)
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert float(output.metrics["lam"]) == (1.0 if objective == "mmf" else 0.0)


def test_a_seed_gives_the_same_loss() -> None:
    loss_fn = MeanFlowLoss(network("mlp"), **preset("mmf"))
    x = torch.randn(8, 3, dtype=torch.float64)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(loss_fn(x).loss.detach()))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_parts_of_a_batch_add_up_to_it(paired: bool, stochastic: bool, count: int) -> None:
    """Whatever else is drawn meanwhile. The 16 rows with r < t divide by four in each part, as `stochastic` needs."""
    net = network("dit", num_classes=3)
    x, y = torch.randn(32, *sample_shape("dit")), torch.arange(32) % 3
    times, guidance = TimeSampler(share=0.5), Guidance(omega=1.5, dropout=0.5)
    loss_fn = MeanFlowLoss(net, times=times, lam=0.5, paired=paired, stochastic=stochastic, guidance=guidance)

    def gradient_of(index: int, count: int) -> list[Tensor]:
        rows = slice(index * 32 // count, (index + 1) * 32 // count)
        torch.rand(1)
        return gradients(loss_fn, x[rows].double(), step=7, part=BatchShare(index, count, seed=3), y=y[rows])

    whole, again = gradient_of(0, 1), gradient_of(0, 1)
    assert close(whole, again, 0.0)
    parts = [gradient_of(index, count) for index in range(count)]
    mean = [torch.stack(grads).mean(0) for grads in zip(*parts, strict=True)]
    assert close(mean, whole, 1e-12)
    other = gradients(loss_fn, x.double(), step=8, part=BatchShare(0, 1, seed=3), y=y)
    assert not close(other, whole, 1e-2)


def test_a_deep_copy_has_its_own_network() -> None:
    loss_fn = MeanFlowLoss(network("mlp"))
    twin = copy.deepcopy(loss_fn)
    next(iter(twin.net.parameters())).data.zero_()
    assert next(iter(loss_fn.net.parameters())).abs().sum() > 0


BAD_CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "integer data": (lambda: MeanFlowLoss(network("mlp"))(torch.zeros(2, 3, dtype=torch.int64)), "floating-point"),
    "no samples": (lambda: MeanFlowLoss(network("mlp"))(torch.zeros(0, 3)), "at least one"),
    "noise shape": (
        lambda: MeanFlowLoss(network("mlp"))(torch.zeros(2, 3), noise=torch.zeros(2, 4)), "noise has shape",
    ),
    "times shape": (
        lambda: MeanFlowLoss(network("mlp"))(torch.zeros(2, 3), times=(torch.zeros(2), torch.zeros(3))), "t has shape",
    ),
    "r above t": (
        lambda: MeanFlowLoss(network("mlp"))(torch.zeros(2, 3), times=(torch.ones(2), torch.zeros(2))),
        "0 <= r <= t <= 1",
    ),
    "NaN times": (
        lambda: MeanFlowLoss(network("mlp"))(torch.zeros(2, 3), times=(torch.full((2,), torch.nan), torch.ones(2))),
        "0 <= r <= t <= 1",
    ),
    "label shape": (
        lambda: MeanFlowLoss(network("mlp", 3))(torch.zeros(2, 3), y=torch.zeros(3, dtype=torch.int64)), "labels y",
    ),
    "unpaired times": (
        lambda: MeanFlowLoss(network("mlp"), paired=True)(torch.zeros(2, 3), times=(torch.zeros(2), torch.ones(2))),
        "as many with r = t",
    ),
    "no labels": (
        lambda: MeanFlowLoss(network("mlp", 3), guidance=Guidance(omega=2.0))(torch.zeros(2, 3)), "needs labels",
    ),
    "no null label": (lambda: MeanFlowLoss(network("mlp"), guidance=Guidance(omega=2.0)), "null_label"),
    "tangent": (lambda: MeanFlowLoss(network("mlp"), tangent="guessed"), "predicted, conditional"),
    "jvp": (lambda: MeanFlowLoss(network("mlp"), jvp="magic"), "dual, func"),
    "paired conditional": (lambda: MeanFlowLoss(network("mlp"), tangent="conditional", paired=True), "predicted"),
    "too many pairs": (lambda: MeanFlowLoss(network("mlp"), times=TimeSampler(share=0.6), paired=True), "partner"),
    "no step": (
        lambda: MeanFlowLoss(network("mlp"), times=TimeSampler(start=10))(torch.zeros(2, 3)), "pass step=",
    ),
    "negative p": (lambda: MeanFlowLoss(network("mlp"), p=-1.0), "negative"),
    "objective": (lambda: preset("rectified"), "meanflow, imf, mmf"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_errors_are_one_line_and_name_the_way_out(case: str) -> None:
    call, words = BAD_CALLS[case]
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_conditional_tangents_warn_when_lambda_can_be_positive() -> None:
    with pytest.warns(UserWarning, match="predicted"):
        MeanFlowLoss(network("mlp"), tangent="conditional", lam=LambdaSchedule(kind="linear", warmup=5))
