"""Writing into Duals: what PyTorch does to a tensor and all that shares its memory, or a refusal."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.operator_database import OPERATORS, name_of, samples, supports
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from mmf_fast import MissingRuleError, jvp
from mmf_fast.forward.buffers import CURRENT
from mmf_fast.forward.dual import DetachedDual, Dual, known_functions, primal, tangent

KINDS = (Dual, DetachedDual)


def constant_sums(x: Any) -> Any:
    """x + c once had the tangent of x itself, so that writing into it changed x."""
    h = x + 1
    h.mul_(2)
    g = 3 - x
    g -= 1
    f = x % 5
    f.zero_()
    return x * h + g + f


def views(x: Any) -> Any:
    y = x * 2
    y[1:].mul_(x[1:])
    y.reshape(-1)[:2].add_(1)
    y.transpose(0, 1)[0] *= 3
    y.contiguous().view(-1)[-1:].copy_(x.flatten()[:1])
    return y * y


def assignments(x: Any) -> Any:
    y = x.square()
    y[0] = 2 * x[1]
    y[:, 1] = 0.5
    y[y > 3] = 1.0
    y[1, torch.tensor([0, 2])] = x[0, :2]
    y[2] += x[0]
    return y * x


def activations(x: Any) -> Any:
    h = nn.Sequential(nn.Linear(3, 3).double(), nn.SiLU(inplace=True), nn.LeakyReLU(0.2, True), nn.Dropout(0.5, True))
    torch.nn.init.constant_(h[0].weight, 0.3)
    torch.nn.init.constant_(h[0].bias, 0.1)
    torch.manual_seed(0)
    return F.relu6(h(x) * 2, True) + torch.relu_(x * 3) + F.elu_(x * 2) + (x + 0).clamp_(-1, 1)


def scattered(x: Any) -> Any:
    y = torch.sin(x)
    y.index_add_(0, torch.tensor([0, 2]), x[:2]).masked_fill_(x > 1, 0.0).addcmul_(x, x, value=0.5)
    y.scatter_(1, torch.tensor([[0], [1], [2]]), x[:, :1])
    return y.exp_() / 7


def shared(x: Any) -> Any:
    """x += y is seen under each name of x, as of a tensor."""
    h = x * 1.5
    skip = h
    h += x.square()
    h /= 2
    h **= 2
    return skip * x


def remainders(x: Any) -> Any:
    y = +x * 3
    first, last = y[0], y[2]
    first %= 0.7
    last %= x[1].exp()
    return y * x


# -- tensors that the network made without a tangent -----------------------------------------------------------------


def filled(x: Any) -> Any:
    """Buffers of zeros, as rotary embeddings and padded batches have them."""
    y, z = torch.empty_like(x), x.new_zeros(2, *x.shape)
    y[..., 0::2], y[..., 1::2] = x[..., 0::2].square(), 3 * x[..., 1::2]
    z[1, :2] = x[:2]
    z[0] += y
    z[0, 0] *= 2
    return (z * x).sum(0) + torch.cat((y, z[1])).sin()[:3] + z.reshape(6, 3)[3:]


def summed(x: Any) -> Any:
    total, last = torch.zeros(3, 3, dtype=x.dtype), torch.zeros(3, dtype=x.dtype)
    for i in range(3):
        total += x * i
        last.add_(x[i].exp()).mul_(0.5)
    return total * last


def seen_through_views(x: Any) -> Any:
    """What shares the memory of a tensor that receives a Dual, made before and after."""
    y = torch.ones(4, 3, dtype=x.dtype)
    before = y.t()
    y[1:].copy_(x * x)
    return before[:, 1:].t() * before.t()[:3] + 2 * y[1:] + (y + x.new_ones(4, 3))[1:]


def by_other_spellings(x: Any) -> Any:
    y = torch.full((3, 3), 2.0, dtype=x.dtype)
    y[:1].fill_(x[0, 0])
    torch.fill_(y[1], x[1, 1])
    last = y[2]
    last **= x[2]
    last %= x[0].exp()
    return y.square()


def in_lists(x: Any) -> Any:
    y = torch.zeros(3, 3, dtype=x.dtype)
    y[:] = torch.cos(x)
    z = torch.stack([y, torch.ones_like(y)])
    a, b = z
    return torch.cat(tensors=[a * b, F.linear(input=y, weight=y)], dim=0)[2:5] + torch.where(y > 0, y, 0.5)


def the_buffer_itself(x: Any) -> Any:
    y = torch.zeros(3, 3, dtype=x.dtype)
    y[0], y[1:] = x[1], x[:2] ** 3
    return y


NETWORKS = [
    *(constant_sums, views, assignments, activations, scattered, shared, remainders),
    *(filled, summed, seen_through_views, by_other_spellings, in_lists, the_buffer_itself),
]
every_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda f: f.__name__)


@every_network
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_value_tangent_and_gradient_through_it(network: Callable[[Any], Any], way: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)
    x, dx, g, h, a, b = (torch.randn(3, 3, dtype=torch.float64) for _ in range(6))

    def functional(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, dy = jvp(network, (x,), (dx,))
        return (g * y).sum() + (h * dy).sum(), y, dy

    run = functional
    if way == "compiled" and network is not activations:  # which builds its layers anew
        run = torch.compile(functional, fullgraph=network is not assignments, backend="aot_eager")
    leaves = x.clone().requires_grad_(), dx.clone().requires_grad_()
    loss, y, dy = run(*leaves)
    torch.testing.assert_close(y, network(x.clone()))
    step = 1e-5
    with torch.no_grad():
        slope = (network(x + step * dx) - network(x - step * dx)) / (2 * step)
        expected = (functional(x + step * a, dx + step * b)[0] - functional(x - step * a, dx - step * b)[0]) / (
            2 * step
        )
    torch.testing.assert_close(dy, slope, rtol=1e-7, atol=1e-7)
    gradients = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close((gradients[0] * a).sum() + (gradients[1] * b).sum(), expected, rtol=1e-6, atol=1e-6)
    detached = jvp(network, (x,), (dx,), tangent_grad=False)
    torch.testing.assert_close(detached, (y, dy))


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("strides", ["steps", "slice", "expanded", "transposed", "transposed slice"])
def test_inputs_of_any_strides_are_written_through_their_views(strides: str, way: str) -> None:
    torch._dynamo.reset()
    x = {
        "steps": torch.randn(2, 3, 8).double()[:, :, ::2],
        "slice": torch.randn(2, 6, 4).double()[:, :3],
        "expanded": torch.randn(1, 3, 4).double().expand(2, 3, 4),
        "transposed": torch.randn(2, 4, 3).double().transpose(1, 2),
        "transposed slice": torch.randn(6, 3, 4).double()[::3].transpose(0, 1),
    }[strides]

    def network(x: Any) -> Any:
        x.reshape(-1).mul_(2)  # of primal and tangent a view, or of both a copy
        first = x[0]
        first += 1
        return x * x

    def run(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(network, (x,), (dx,))

    dx, step, dense = torch.randn(x.shape, dtype=x.dtype), 1e-5, x.clone()
    slope = (network(dense + step * dx) - network(dense - step * dx)) / (2 * step)
    y, dy = (torch.compile(run, backend="aot_eager", fullgraph=True) if way == "compiled" else run)(x, dx)
    torch.testing.assert_close(y, network(dense))
    torch.testing.assert_close(dy, slope, rtol=1e-7, atol=1e-7)


def test_an_integer_quotient_is_written_through_a_view() -> None:
    """PyTorch has no gradient of it."""

    def network(x: Any) -> Any:
        y = x * 3
        first = y[0]
        first //= 2
        return y

    x, dx = torch.randn(2, 3), torch.ones(2, 3)
    y, dy = jvp(network, (x,), (dx,))
    assert torch.equal(y, network(x)) and torch.equal(dy, torch.tensor([[0.0] * 3, [3.0] * 3]))


def test_the_tangents_of_the_caller_are_not_written_to() -> None:
    x, dx = torch.ones(3), torch.full((3,), 2.0)
    assert torch.equal(jvp(lambda x: x.mul_(3), (x.clone(),), (dx,))[1], 3 * dx) and torch.equal(
        dx, torch.full((3,), 2.0)
    )


IN_PLACE = [op for op in OPERATORS if op.inplace_variant in known_functions() and supports(op, torch.float64)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", IN_PLACE, ids=name_of)
def test_a_method_writes_what_its_function_returns(op: Any, kind: type[Dual]) -> None:
    for sample in samples(op, torch.float64, 3):
        x, *others = sample.leaves
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        _, args, kwargs = tree_unflatten([x, *others], sample.spec)
        dx = torch.randn_like(x)
        try:
            expected = op.op(kind(x, dx), *args, **kwargs)
            op.inplace_variant(x.clone(), *args, **kwargs)
        except (MissingRuleError, RuntimeError, TypeError):
            continue  # refused, or the result does not fit
        if expected.shape != x.shape:
            continue  # PyTorch changes the shape of what it writes to
        written = kind(x.clone(), dx.clone())
        out = getattr(kind, op.inplace_variant.__name__)(written, *args, **kwargs)
        y = primal(expected)
        dy = torch.zeros_like(x) if tangent(expected) is None else tangent(expected)
        torch.testing.assert_close((written.primal, written.tangent), (y.to(x.dtype), dy), equal_nan=True)
        assert out.primal.data_ptr() == written.primal.data_ptr() and type(out) is kind


X = Dual(torch.ones(2, 4), torch.ones(2, 4))
LEAF = torch.ones(2, 4, requires_grad=True)


@pytest.mark.parametrize("function", [
    lambda x: torch.exp(x, out=torch.empty(2, 4)), lambda x: x.transpose_(0, 1),
    lambda x: x.detach_(), lambda x: x.normal_(), lambda x: x.bernoulli_(), lambda x: x.set_(x), lambda x: x.resize_(3),
    lambda x: Dual(LEAF, x.tangent).mul_(2), lambda x: Dual(x.primal, LEAF).mul_(2),
    lambda x: x[:1].expand(5, 4).add_(1), lambda x: Dual(x.primal, None).add_(x),
    lambda x: operator.setitem(Dual(x.primal, None), 0, x[0]),
    lambda x: operator.setitem(Dual(LEAF, x.tangent), 0, 1.0),
    lambda x: x.copy_(DetachedDual(x.primal, x.tangent)), lambda x: x.mul_(1j), lambda x: x[0].add_(x),
])  # fmt: skip
def test_what_cannot_be_written_is_refused(function: Callable[[Any], Any]) -> None:
    with pytest.raises(MissingRuleError):
        function(X)
    assert torch.equal(X.primal, torch.ones(2, 4)) and torch.equal(X.tangent, torch.ones(2, 4))


Z = torch.ones(2, 4)


@pytest.mark.parametrize("write", [
    lambda x: torch.ones(2, 4, dtype=torch.long).copy_(x),  # not a float
    lambda x: torch.ones(4).expand(2, 4).copy_(x),
    lambda x: torch.ones(2, 4, requires_grad=True).mul_(x),
    lambda x: Z.add_(x),  # the memory of a Dual
    lambda x: (x * 1).detach().mul_(x),
    lambda x: torch.exp(x, out=torch.empty(2, 4)),
])  # fmt: skip
def test_what_cannot_receive_a_dual_is_refused_in_a_pass(write: Callable[[Any], Any]) -> None:
    with pytest.raises(MissingRuleError):
        jvp(write, (Z,), (torch.ones(2, 4),))
    assert torch.equal(Z, torch.ones(2, 4))


def test_detach_gives_memory_that_received_a_dual_as_a_constant() -> None:
    def network(x: Any) -> Any:
        y = torch.zeros(2, 4)
        y += 3 * x
        z = torch.zeros(2, 4)
        z[:] = y
        return (y.detach() + z.detach().add_(1) + torch.detach(z)) * x

    assert torch.equal(jvp(network, (Z,), (Z,))[1], 10 * Z)


def test_memory_that_received_a_dual_is_a_constant_after_the_pass() -> None:
    cache = torch.zeros(2, 4)

    def network(x: Any) -> Any:
        cache.copy_(x * 2)
        return cache * cache

    assert torch.equal(jvp(network, (Z,), (Z,))[1], 8 * Z)
    assert not CURRENT.buffers.tangents and torch.equal(jvp(lambda x: cache * x, (Z,), (Z,))[1], 2 * Z)
    halves = cache.view(torch.float16)
    with pytest.raises(NotImplementedError, match="clone"):
        jvp(lambda x: (cache.copy_(x), halves + 1)[1], (Z,), (Z,))
