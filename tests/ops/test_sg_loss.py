"""The fused loss, for every implementation: against their formulas in float64."""

import pytest
import torch
from support.operator_harness import SLACK, distance

from mmf_fast.ops.sg_loss import sg_loss


def composed(u, du, interval, lam, target, p, c):
    e = u - target
    if du is not None:
        tau = interval.view(-1, *[1] * (u.ndim - 1)).to(u.dtype)
        e = e + tau * (lam * du + (1 - lam) * du.detach())
    square = e.square().flatten(1).sum(1)
    per_sample = square * (square.detach() + c) ** -p
    return per_sample.mean(), per_sample, square


def draw(shape):
    return [torch.randn(shape, dtype=torch.float64) for _ in range(3)] + [torch.rand(shape[0], dtype=torch.float64)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2, 7, 7), (2, 196), (5, 5001)], ids=str)
def test_values_and_both_gradients(device, shape, tangent, dtype):
    u, du, target, tau = draw(shape)
    wide = torch.promote_types(dtype, torch.float32)

    def run(function, dtype, device):
        leaves = [a.to(device, dtype).requires_grad_() for a in (u, du)]
        out = function(
            leaves[0], leaves[1] if tangent else None, tau.to(device, torch.promote_types(dtype, torch.float32))
        )
        return [*out, *torch.autograd.grad(2.5 * out[0], leaves[: 1 + tangent])]

    def fused(u, du, tau):
        lam = torch.tensor(0.3, dtype=wide, device=u.device)
        return sg_loss(u, du, tau, lam, target.to(u.device, wide), p=0.75, c=0.01)

    def plain(u, du, tau):
        return composed(u, du, tau, 0.3, target.to(u.dtype), 0.75, 0.01)

    exact, same, ours = run(plain, torch.float64, "cpu"), run(plain, dtype, "cpu"), run(fused, dtype, device)
    for i, (a, b, right) in enumerate(zip(ours, same, exact, strict=True)):
        assert distance(a, right) <= 2 * distance(b, right) + SLACK[dtype], i
    assert ours[0].dtype == ours[1].dtype == wide and ours[3].dtype == dtype


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_lambda_acts_on_the_gradient_alone(device, lam):
    u, du, target, tau = (a.to(device) for a in draw((3, 10)))
    u.requires_grad_(), du.requires_grad_()
    out = sg_loss(u, du, tau, lam, target)
    torch.testing.assert_close(out.loss, composed(u, du, tau, 0.5, target, 1.0, 1e-3)[0])
    g_u, g_du = torch.autograd.grad(out.loss, (u, du))
    torch.testing.assert_close(g_du, lam * tau[:, None] * g_u)
    detached = sg_loss(u, du, tau, lam, target, tangent_grad=False).loss
    assert torch.autograd.grad(detached, du, allow_unused=True)[0] is None


def test_gradcheck_at_lambda_one(device):
    """Without weights (p = 0) and at lam = 1 the gradient is the derivative of the value."""
    u, du, target, tau = (a.to(device) for a in draw((2, 6)))
    arguments = (u.requires_grad_(), du.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda u, du: sg_loss(u, du, tau, 1.0, target, p=0.0).loss, arguments, fast_mode=True
    )


def test_only_the_loss_has_a_gradient_and_targets_get_none(device):
    u, du, target, tau = (a.to(device).requires_grad_() for a in draw((2, 6)))
    out = sg_loss(u, du, tau, 0.5, target)
    assert out.loss.requires_grad and not out.per_sample.requires_grad and not out.square.requires_grad
    assert torch.autograd.grad(out.loss, (target, tau), allow_unused=True) == (None, None)


def test_a_second_derivative_is_refused_not_wrong():
    u, du, target, tau = draw((3, 10))
    u.requires_grad_()
    with pytest.raises(RuntimeError, match="sg_loss has no second derivative as a fused operator"):
        (g_u,) = torch.autograd.grad(sg_loss(u, du, tau, 0.5, target).loss, [u], create_graph=True)
        g_u.square().sum().backward()
