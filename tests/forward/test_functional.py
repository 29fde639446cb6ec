"""The other two ways of `jvp`: torch.func.jvp made right, and finite differences."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmf_fast import LambdaSchedule, MeanFlowLoss, TimeSampler, jvp
from mmf_fast.forward.functional import FiniteDifference


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def check(net: nn.Module, x: Tensor, dx: Tensor) -> None:
    """Value, tangent and gradient through the tangent of mode "func" against differences."""
    net = net.double().eval()
    y, dy = jvp(net, (x,), (dx,), mode="func")
    c, h, parameters = tensor(*y.shape), 1e-4, list(net.parameters())

    def shifted(k: int) -> list[Tensor]:
        out = net(x + k * h * dx)
        return [out.detach(), *torch.autograd.grad((c * out).sum(), parameters)]

    truth = [(8 * (a - b) - c + d) / (12 * h) for a, b, c, d in zip(*map(shifted, (1, -1, 2, -2)), strict=True)]
    torch.testing.assert_close(y, net(x))
    torch.testing.assert_close(dy.detach(), truth[0], rtol=1e-7, atol=1e-7)
    for found, right in zip(
        torch.autograd.grad((c * dy).sum(), parameters, materialize_grads=True), truth[1:], strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.options = options

    def forward(self, x: Any) -> Any:
        return self.inner(x, x, x, **self.options)[0]


class GroupedQueries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 24)

    def forward(self, x: Any) -> Any:
        q, k, v = self.inner(x).split([16, 4, 4], -1)
        heads = [h.unflatten(-1, (-1, 4)).transpose(1, 2) for h in (q, k, v)]
        return F.scaled_dot_product_attention(*heads, enable_gqa=True)


TOKENS = {
    "nn.MultiheadAttention": SelfAttention(),
    "nn.MultiheadAttention, no weights": SelfAttention(need_weights=False),
    "nn.TransformerEncoderLayer": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "nn.TransformerEncoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    "enable_gqa": GroupedQueries(),
}


@pytest.mark.parametrize("name", TOKENS)
def test_attention_inside_a_function_of_pytorch_is_exact(name: str) -> None:
    check(TOKENS[name], tensor(2, 5, 8), tensor(1, 5, 8).expand(2, 5, 8))


def test_group_norm_of_channels_last() -> None:
    x, dx = (
        tensor(*shape).expand(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
        for shape in ((2, 8, 4, 4), (8, 4, 4))
    )
    check(nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.SiLU()).to(memory_format=torch.channels_last), x, dx)


@pytest.mark.parametrize("name", ["det", "slogdet", "solve", "cholesky", "eigh"])
def test_func_refuses_what_pytorch_gets_wrong_in_the_graph(name: str) -> None:
    a = tensor(3, 3) @ tensor(3, 3).T + 3 * torch.eye(3, dtype=torch.float64)
    function = getattr(torch.linalg, name)

    def first(x: Tensor) -> Tensor:
        out = function(x, x[:, :1]) if name == "solve" else function(x)
        return out if isinstance(out, Tensor) else out[1]

    with pytest.raises(NotImplementedError, match=f'{name}.*jvp="func"'):
        jvp(first, (a,), (a,), mode="func")
    assert jvp(first, (a,), (a,), tangent_grad=False, mode="func")[1].isfinite().all()


@pytest.mark.parametrize(("way", "error"), [
    ("finite_difference", 1e-3), (FiniteDifference(1e-5), 1e-5), (FiniteDifference(1e-3, order=2), 1e-6),
])  # fmt: skip
def test_finite_differences_err_by_their_step_to_the_power_of_their_order(way: Any, error: float) -> None:
    x, dx = tensor(3), tensor(3).sin()
    y, dy = jvp(torch.sin, (x,), (dx,), mode=way)
    assert torch.equal(y, x.sin()) and (dy - x.cos() * dx).abs().max() < error  # |f'''| and |f''| are at most 1


@pytest.mark.parametrize("way", ["finite_difference", FiniteDifference(order=2)])
def test_all_evaluations_draw_the_same_random_numbers(way: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, 4)).double()
    x, dx = tensor(3, 4), tensor(3, 4).cos()
    torch.manual_seed(0)
    y, dy = jvp(net, (x,), (dx,), mode=way)
    after = torch.rand(())
    torch.manual_seed(0)
    exact_y, exact = jvp(net, (x,), (dx,))
    assert torch.equal(y, exact_y) and torch.equal(torch.rand(()), after)  # as if the network had run once
    torch.testing.assert_close(dy, exact, rtol=0, atol=2e-2)  # two masks differ by about 1 / step


class Counting(nn.Module):
    """Another function at each call, by a buffer that it writes in place or binds anew."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.register_buffer("phase", torch.zeros(4, dtype=torch.float64))
        self.in_place = in_place

    def forward(self, x: Any) -> Any:
        if self.in_place:
            self.phase.add_(1)
        else:
            self.phase = self.phase + 1
        return torch.sin(x + self.phase)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: nn.BatchNorm1d(4),
        lambda: Counting(in_place=True),
        lambda: Counting(in_place=False),
    ],
    ids=["spectral norm", "parametrized spectral norm", "batch norm", "in place", "bound anew"],
)
def test_finite_differences_are_of_one_function_though_a_network_changes_its_buffers(make: Any) -> None:
    torch.manual_seed(0)
    net, twin = make().double(), make().double()
    twin.load_state_dict(net.state_dict())
    x, dx = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    y, dy = jvp(lambda x: net(x).square(), (x,), (dx,), mode=FiniteDifference(1e-5, order=2))
    expected, exact = jvp(lambda x: twin(x).square(), (x,), (dx,))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dy, exact, rtol=1e-7, atol=1e-7)  # h^2, and 1e-16 / h
    for found, once in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, once, rtol=1e-14, atol=0)
    if any(p.requires_grad for p in net.parameters()):
        for a, b in zip(*(torch.autograd.grad(d.sum(), list(n.parameters()), allow_unused=True)
                          for d, n in ((dy, net), (exact, twin))), strict=True):  # fmt: skip
            assert (a is None) == (b is None)
            torch.testing.assert_close(*(torch.zeros(()) if g is None else g for g in (a, b)), rtol=1e-6, atol=1e-6)


def test_compiled_finite_differences_refuse_random_numbers() -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    step = torch.compile(lambda x: jvp(net, (x,), (x,), mode="finite_difference"), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="same random numbers"):
        step(torch.randn(2, 4))
    net.eval()
    torch.testing.assert_close(step(torch.ones(2, 4))[1], net[0](torch.ones(2, 4)) - net[0].bias, rtol=0, atol=1e-2)


def test_finite_differences_in_bf16_warn() -> None:
    net, x = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="bfloat16"):
        jvp(net, (x,), (x,), mode="finite_difference")


@pytest.mark.parametrize("way", [FiniteDifference(0.0), FiniteDifference(order=3), "central"])
def test_a_way_that_is_none_is_refused(way: Any) -> None:
    with pytest.raises(ValueError):
        jvp(torch.sin, (tensor(2),), (tensor(2),), mode=way)
    with pytest.raises(ValueError):
        MeanFlowLoss(lambda z, r, t: z, jvp=way)


class Velocity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, z: Any, r: Any, t: Any) -> Any:
        return self.linear(z) * torch.cos(t)[:, None]


def test_the_loss_takes_step_and_order_and_counts_the_evaluations() -> None:
    net, times = Velocity(), TimeSampler(share=0.5)
    one, two = (
        MeanFlowLoss(net, times=times, lam=lam, paired=True, jvp=FiniteDifference(1e-2, order=order))
        for lam, order in ((LambdaSchedule(value=0.5), 1), (LambdaSchedule(value=0.5), 2))
    )
    assert two.forwards(8) - one.forwards(8) == 4 * 3
    exact = MeanFlowLoss(net, times=times, lam=0.5, paired=True)
    losses = []
    for loss in (exact, two):
        torch.manual_seed(0)
        losses.append(loss(torch.ones(8, 3)).loss)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_compiled_loss_trains_the_copy() -> None:
    torch._dynamo.reset()
    loss = MeanFlowLoss(Velocity(), times=TimeSampler(share=0.5), lam=0.5, paired=True)
    loss.compile(backend="eager")
    loss(torch.ones(4, 3)).loss.backward()
    loss.zero_grad()
    twin = copy.deepcopy(loss)
    with torch.no_grad():
        twin.net.linear.weight.mul_(2)
    torch.manual_seed(0)
    value = twin(torch.ones(4, 3)).loss
    value.backward()
    assert loss.net.linear.weight.grad is None and twin.net.linear.weight.grad.abs().sum() > 0
    eager = MeanFlowLoss(twin.net, times=TimeSampler(share=0.5), lam=0.5, paired=True)
    torch.manual_seed(0)
    torch.testing.assert_close(eager(torch.ones(4, 3)).loss, value)
