"""MeanFlowLoss.forwards against the FLOPs that torch counts in a whole step, and against the numbers written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmf_fast import Guidance, LambdaSchedule, MeanFlowLoss, TimeSampler
from mmf_fast.models import MLP

pytestmark = pytest.mark.filterwarnings("ignore:conditional tangents")
BATCH = 16
CASES: dict[str, tuple[dict[str, Any], float]] = {  # settings and cost per sample, by hand
    "flow matching": (dict(share=0.0, lam=0.0), 3),
    "lambda 0": (dict(share=1.0, lam=0.0, tangent="conditional"), 4),
    "lambda 1": (dict(share=1.0, lam=1.0, tangent="conditional"), 6),
    "a quarter, lambda 0": (dict(share=0.25, lam=0.0, tangent="conditional"), 0.75 * 3 + 0.25 * 4),
    "a quarter, lambda 0.5": (dict(share=0.25, lam=0.5, tangent="conditional"), 0.75 * 3 + 0.25 * 6),
    "predicted": (dict(share=0.5, lam=0.0), 0.5 * 3 + 0.5 * 4 + 0.5),
    "paired": (dict(share=0.5, lam=1.0, paired=True), 0.5 * 3 + 0.5 * 6),
    "stochastic": (dict(share=1.0, lam=0.5, tangent="conditional", stochastic=True), 0.5 * 4 + 0.5 * 6),
    "guided": (dict(share=0.5, lam=0.0, paired=True, guidance=Guidance(omega=2.0)), 0.5 * 3 + 0.5 * 4 + 1),
    "guided by class": (
        dict(share=0.5, lam=0.0, tangent="conditional", guidance=Guidance(omega=2.0, kappa=0.5)),
        0.5 * 3 + 0.5 * 4 + 1 + 0.5,
    ),
    "guided, kappa, conditional, whole": (
        dict(share=1.0, lam=0.0, tangent="conditional", guidance=Guidance(omega=1.0, kappa=0.5)),
        6,
    ),
    "guided by a range, paired": (
        dict(share=0.5, lam=0.0, paired=True, guidance=Guidance(omega=(1.0, 8.0))),
        0.5 * 3 + 0.5 * 4 + 1,
    ),
    "only dropout": (dict(share=0.0, lam=0.0, guidance=Guidance()), 3),
}


def made(options: dict[str, Any]) -> MeanFlowLoss:
    torch.manual_seed(0)
    net = MLP(dim=2, width=64, depth=32, num_classes=3, guided=True)
    rest = {key: value for key, value in options.items() if key != "share"}
    return MeanFlowLoss(net, times=TimeSampler(share=options["share"]), **rest)


@pytest.mark.parametrize("name", CASES)
def test_forwards_are_those_written_out(name: str) -> None:
    options, per_sample = CASES[name]
    assert made(options).forwards(BATCH, step=1) == per_sample * BATCH


@pytest.mark.parametrize("name", CASES)
def test_forwards_are_the_work_that_torch_counts(name: str) -> None:
    """Less a little: nobody asks for the gradient of the data, so the first layers have a smaller backward."""
    loss_fn = made(CASES[name][0])
    x, y = torch.randn(BATCH, 2), torch.randint(3, (BATCH,))
    with FlopCounterMode(display=False) as counter:
        loss_fn(x, step=1, y=y).loss.backward()
    forward = loss_fn.net.flops(BATCH) / BATCH
    assert counter.get_total_flops() / forward == pytest.approx(loss_fn.forwards(BATCH, step=1), rel=0.03)


def test_the_curriculum_decides_step_by_step() -> None:
    schedule = LambdaSchedule(kind="linear", start=2, warmup=10)
    loss_fn = MeanFlowLoss(MLP(2, width=8, depth=1), times=TimeSampler(share=0.5), lam=schedule, paired=True)
    assert [loss_fn.forwards(8, step) for step in range(5)] == [28, 28, 28, 36, 36]
    loss_fn.times = TimeSampler(share=0.5, start=1)
    assert [loss_fn.forwards(8, step) for step in range(5)] == [24, 28, 28, 36, 36]
