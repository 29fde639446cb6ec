"""The ways of the field are written rightly: what is timed beside ours computes the same."""

import pytest
import torch

from benchmarks.cases import CASES, Case
from benchmarks.field import WAYS, FieldLoss
from mmf_fast import MeanFlowLoss, TimeSampler
from mmf_fast.models import MLP

SHARE = TimeSampler(share=0.5)


@pytest.fixture
def net(float64):
    net = MLP(width=16, depth=2)  # without layer norm, whose derivatives torch.func gets wrong
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def value_and_gradient(net, loss_fn):
    torch.manual_seed(1)
    value = loss_fn(torch.linspace(-1, 1, 24).view(12, 2), step=0).loss
    return value.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("exact", [False, True])
def test_equal_seeds_give_our_loss_and_gradient(net, way, exact, monkeypatch):
    if exact and way in ("second forward", "finite differences"):
        pytest.skip("has no gradient through du/dt")
    monkeypatch.setattr("benchmarks.field.STEP", 1e-5)  # in float64: a bias of 1e-10 third derivatives, less rounding
    with pytest.warns(UserWarning) if exact else torch.enable_grad():
        ours = MeanFlowLoss(net, times=SHARE, tangent="conditional", lam=float(exact))
    expected, found = value_and_gradient(net, ours), value_and_gradient(net, FieldLoss(net, way, SHARE, exact))
    tolerance = 1e-6 if way == "finite differences" else 1e-12
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_without_its_gradient_lambda_one_would_differ(net):
    """So the test above can see it."""
    zero, one = (value_and_gradient(net, FieldLoss(net, "torch.func.jvp", SHARE, exact)) for exact in (False, True))
    assert zero[0] == one[0] and (zero[1] - one[1]).norm() > 1e-2 * one[1].norm()


@pytest.mark.parametrize("name", CASES)
def test_evaluations_are_those_that_the_loss_counts(name):
    case = CASES[name]
    loss_fn = Case(case.share, case.loss).build(MLP(width=16, depth=1))  # what the algorithm needs, whatever the way
    steps = range(200) if case.loss.get("stochastic") else range(1)
    mean = sum(loss_fn.forwards(32, step) for step in steps) / len(steps) / 32
    assert case.evaluations() == pytest.approx(mean, rel=2e-3) and case.bound() == case.evaluations() / 3


def test_bounds_by_hand():
    assert CASES["lambda 0, 100 %"].bound() == pytest.approx(4 / 3)
    assert CASES["lambda 1, 100 %"].bound() == pytest.approx(2)
    assert CASES["lambda 1, 25 %, paired"].bound() == pytest.approx(1.25)
    assert CASES["lambda 0, 25 %, predicted"].bound() == pytest.approx(1 + 0.25 * 2 / 3)
    assert CASES["lambda 0.5 stochastic, 25 %, paired"].bound() == pytest.approx(1 + 0.25 * 2 / 3)
