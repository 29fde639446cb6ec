"""The weight by (r, t): its running means written out, no bias at the exact flow, the same in parts, saved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.small_networks import batch, network
from support.tiny_runs import tiny
from torch import Tensor, nn

from mmf_fast import MeanFlowLoss, TimeSampler
from mmf_fast.objective import BatchShare
from mmf_fast.objective.weights import TimesWeight
from mmf_fast.train import build_trainer


class AlmostExact(nn.Module):
    """u of the mixture 0.8 N(-1, 0.25) + 0.2 N(2, 0.25), exact but for its step, and two ways to be wrong, not taken.

    v(z, t) = E[eps - x | z] is known; u(z, r, t) is its mean along the flow from t to r (Runge-Kutta).
    """

    STEPS = 8

    def __init__(self) -> None:
        super().__init__()
        self.wrong = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("means", torch.tensor([-1.0, 2.0], dtype=torch.float64))
        self.register_buffer("prior", torch.tensor([0.8, 0.2], dtype=torch.float64))

    def velocity(self, z: Any, t: Any) -> Any:
        t = t[:, None]
        variance = (1 - t) ** 2 * 0.25 + t**2
        away = z - (1 - t) * self.means  # (B, 2)
        gamma = torch.softmax(self.prior.log() - away.square() / (2 * variance), dim=1)
        of_each = (t - (1 - t) * 0.25) / variance * away - self.means
        return (gamma * of_each).sum(1, keepdim=True)

    def forward(self, z: Any, r: Tensor, t: Any) -> Any:
        start, h, total = z, (r - t) / self.STEPS, 0.0
        for i in range(self.STEPS):
            now, half = t + i * h, h[:, None] / 2
            k1 = self.velocity(z, now)
            k2 = self.velocity(z + half * k1, now + h / 2)
            k3 = self.velocity(z + half * k2, now + h / 2)
            k4 = self.velocity(z + h[:, None] * k3, now + h)
            mean = (k1 + 2 * k2 + 2 * k3 + k4) / 6
            z, total = z + h[:, None] * mean, total + mean / self.STEPS
        return total + self.wrong[0] + self.wrong[1] * torch.tanh(start)

    @staticmethod
    def data(rows: int) -> Tensor:
        component = (torch.rand(rows, 1, dtype=torch.float64) < 0.2).double()
        return 3 * component - 1 + 0.5 * torch.randn(rows, 1, dtype=torch.float64)


def standard_errors(**options: Any) -> float:
    """How far the mean gradient at the exact flow is from zero, in standard errors: the larger of two directions."""
    net = AlmostExact()
    loss_fn = MeanFlowLoss(net, times=TimeSampler(share=0.5), c=1e-2, **options)
    gradients = torch.stack(
        [torch.autograd.grad(loss_fn(net.data(2000), step=step).loss, net.wrong)[0] for step in range(25)]
    )
    return float((gradients.mean(0).abs() / (gradients.std(0) / len(gradients) ** 0.5)).max())


@pytest.mark.parametrize("options", [
    {"lam": 0.0}, {"lam": 1.0}, {"lam": 0.5, "paired": True, "stochastic": True},
], ids=str)  # fmt: skip
def test_the_expected_gradient_at_the_exact_flow_is_zero(options: dict[str, Any]) -> None:
    """As with p = 0, and unlike with the weight of each sample: there it is many standard errors away."""
    torch.manual_seed(0)
    assert standard_errors(p=1.0, weight="times", **options) < 4.5
    assert standard_errors(p=0.0, **options) < 4.5
    assert standard_errors(p=1.0, **options) > 8


def times_of(count: int) -> tuple[Tensor, Tensor]:
    r, t = torch.rand(2, count, dtype=torch.float64).sort(0).values
    r[: count // 3] = t[: count // 3]
    t[0] = r[0] = 0.0
    t[1] = r[1] = 1.0
    r[-1], t[-1] = 0.0, 1.0
    return r, t


def test_the_running_means_written_out() -> None:
    """Row by row, in a dictionary of bins, over steps that decay; a step's weights come from the steps before it."""
    net, p, c = network("mlp"), 0.75, 0.1
    loss_fn = MeanFlowLoss(net, p=p, c=c, weight="times", lam=0.3)
    sums: dict[tuple[int, int], list[float]] = {}
    for step in range(4):
        x, noise, _ = batch("mlp", size=12, instants=4)
        r, t = times_of(12)
        output = loss_fn(x, step=step, noise=noise, times=(r, t))
        square = MeanFlowLoss(net, p=0.0)(x, noise=noise, times=(r, t)).per_sample
        mean = (1 + sum(s for s, _ in sums.values())) / (1 + sum(n for _, n in sums.values()))
        bins = [
            (min(7, int(8 * b)), min(7, int(8 * (b - a) / b)) if b else 0)
            for a, b in zip(r.tolist(), t.tolist(), strict=True)
        ]
        for i, place in enumerate(bins):
            s, n = sums.get(place, [0.0, 0.0])
            weight = (3 * (s + 8 * mean) / (n + 8) + c) ** -p  # samples have 3 elements
            assert float(output.per_sample[i]) == pytest.approx(weight * float(square[i]), rel=1e-6)
        sums = {place: [0.99 * s, 0.99 * n] for place, (s, n) in sums.items()}
        for place, value in zip(bins, square.tolist(), strict=True):
            old = sums.setdefault(place, [0.0, 0.0])
            sums[place] = [old[0] + value / 3, old[1] + 1]
    assert len(sums) > 20  # of 64


def test_after_many_steps_the_loss_is_one_whatever_the_scale() -> None:
    for scale in (1e-2, 1e2):
        loss_fn = MeanFlowLoss(network("mlp"), p=1.0, weight="times", c=0.0)
        losses = [float(loss_fn(scale * torch.randn(64, 3), step=step).loss.detach()) for step in range(30)]
        assert sum(losses[10:]) / 20 == pytest.approx(1.0, abs=0.4)


@pytest.mark.parametrize("options", [{}, {"paired": True}, {"paired": True, "stochastic": True}], ids=str)
@pytest.mark.parametrize("count", [2, 4])
def test_parts_of_a_step_add_up_to_it(options: dict[str, Any], count: int) -> None:
    """Several backward passes in a step: weights and, from the next step on, sums are those of the whole batch."""
    net = network("mlp")
    make = {"times": TimeSampler(share=0.5), "lam": 0.5, "weight": "times", **options}
    one, parts = MeanFlowLoss(net, **make), MeanFlowLoss(net, **make)
    for step in range(3):
        x = torch.randn(32, 3, dtype=torch.float64)
        whole = one(x, step=step, part=BatchShare(0, 1, seed=3)).per_sample
        found = [
            parts(x[i * 32 // count : (i + 1) * 32 // count], step=step, part=BatchShare(i, count, seed=3)).per_sample
            for i in range(count)
        ]
        torch.testing.assert_close(torch.cat(found), whole, rtol=1e-6, atol=0)
        torch.testing.assert_close(parts.by_times.sums, one.by_times.sums, rtol=1e-6, atol=0)
    assert float(one.by_times.sums[1].sum()) == pytest.approx(32 * (1 + 0.99 + 0.99**2), rel=1e-6)


def test_what_is_no_training_step_does_not_count() -> None:
    loss_fn = MeanFlowLoss(network("mlp"), weight="times")
    x = torch.randn(8, 3, dtype=torch.float64)
    with torch.no_grad():
        loss_fn(x)
    loss_fn.eval()(x)
    assert not loss_fn.by_times.sums.any()
    loss_fn.train()(x)
    assert float(loss_fn.by_times.sums[1].sum()) == 8


def test_a_row_that_is_not_finite_does_not_spoil_the_sums() -> None:
    loss_fn = MeanFlowLoss(network("mlp"), weight="times")
    x = torch.randn(8, 3, dtype=torch.float64)
    x[3] = torch.inf
    assert not loss_fn(x).loss.isfinite()
    assert loss_fn.by_times.sums.isfinite().all() and float(loss_fn.by_times.sums[1].sum()) == 7


def test_the_sums_keep_their_precision_and_their_tensor() -> None:
    weights = TimesWeight(1.0, 1e-3)
    sums = weights.sums
    outer = nn.Sequential(weights, nn.Linear(2, 2)).bfloat16()
    assert weights.sums is sums and sums.dtype == torch.float32 and outer[1].weight.dtype == torch.bfloat16
    assert list(weights.state_dict()) == ["sums"]


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_compiled_and_eager_steps_agree(lam: float) -> None:
    torch._dynamo.reset()
    net = network("mlp")
    eager = MeanFlowLoss(net, lam=lam, p=1.0, weight="times")
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="aot_eager")
    for step in range(3):
        x, noise, times = batch("mlp", size=12, instants=4)
        outputs = [loss_fn(x, step=step, noise=noise, times=times) for loss_fn in (eager, compiled)]
        torch.testing.assert_close(outputs[0].per_sample, outputs[1].per_sample, rtol=1e-9, atol=0)
        grads = [torch.autograd.grad(output.loss, list(loss_fn.net.parameters()), allow_unused=True)
                 for output, loss_fn in zip(outputs, (eager, compiled), strict=True)]  # fmt: skip
        for one, other in zip(*grads, strict=True):
            assert one is other is None or torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_a_run_that_goes_on_has_its_sums(tmp_path: Any) -> None:
    """Stopped after 4 of 12 steps, it ends where one that was not ends; the sums are in the checkpoint."""
    ends = []
    for name, stops in (("whole", (12,)), ("stopped", (4, 12))):
        for steps in stops:
            made = tiny(loss={"weight": "times"}, train={"steps": steps})
            trainer = build_trainer(made, tmp_path / name, resume=steps != stops[0])
            trainer.fit()
        ends.append({key: value.clone() for key, value in trainer.engine.model.state_dict().items()})
    assert float(ends[0]["by_times.sums"][1].sum()) > 16 * 10
    for key, value in ends[0].items():
        assert value.equal(ends[1][key]), key


def test_an_unknown_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="weight is 'row': choose one of sample, times"):
        MeanFlowLoss(network("mlp"), weight="row")
