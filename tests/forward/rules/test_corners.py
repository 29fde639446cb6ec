"""Kinks, ties, half-defined arguments and refusals, which central differences cannot judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmf_fast import MissingRuleError
from mmf_fast.forward.dual import DetachedDual, Dual, primal, tangent

KINKS = torch.tensor([[-3.0, 0.0, 3.0, 1.0], [1.0, 1.0, -1.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "function",
    [
        torch.relu, torch.abs, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.hardswish, F.hardsigmoid, F.softshrink,
        lambda x: x.clamp(-1, 1), lambda x: x.clamp_min(0), lambda x: torch.maximum(x, torch.ones_like(x)),
        lambda x: x.amax(1), lambda x: x.amin(), lambda x: x.max(1).values, lambda x: x.min(), torch.norm,
        lambda x: torch.linalg.vector_norm(0 * x, dim=1), lambda x: x.prod(1), lambda x: x**2, lambda x: x**0,
        lambda x: F.max_pool1d(x, 2), lambda x: x.sort(1).values, lambda x: F.normalize(0 * x),
    ],
)  # fmt: skip
def test_at_kinks_the_tangent_is_autograds_derivative(function: Callable[[Any], Any]) -> None:
    """<g, dy> = <J^T g, dx> with the J^T of autograd."""
    x = KINKS.clone().requires_grad_()
    dx = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    y = function(x)
    g = torch.randn(y.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    (backward,) = torch.autograd.grad(y, x, g)
    out = function(Dual(KINKS, dx))
    assert torch.isclose((g * out.tangent).sum(), (backward * dx).sum(), rtol=1e-7, atol=1e-7)


def test_attention_rows_that_attend_to_nothing_are_zero_and_have_finite_gradients() -> None:
    q, k, v = (torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    out = F.scaled_dot_product_attention(Dual(q, torch.ones_like(q)), Dual(k, torch.ones_like(k)), v, mask)
    assert not out.tangent[:, 1].any()
    (out.primal.sum() + out.tangent.square().sum()).backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_running_statistics_are_updated_once() -> None:
    for layer, x in ((nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)), (nn.BatchNorm1d(3), torch.randn(4, 3))):
        layer(x)
        expected = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        layer.reset_running_stats()
        layer(Dual(x, torch.randn_like(x)))
        for name, buffer in layer.named_buffers():
            assert torch.equal(buffer, expected[name])


@pytest.mark.parametrize("operators", ["", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_epsilon_of_rms_norm_is_that_of_its_statistics(
    operators: str, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a scale of 1e-2 the epsilon of bfloat16 is a hundred times the mean square, that of float32 a thousandth."""
    monkeypatch.setenv("MMF_FAST_OPS", operators)
    layer = nn.RMSNorm(64, dtype=dtype)
    x, dx = (1e-2 * torch.randn(4, 64, dtype=dtype) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, out = layer(x), layer(Dual(x, dx))
    x, dx = x.double(), dx.double()
    r_rms = (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
    slope = r_rms * (dx - x * r_rms**2 * (x * dx).mean(-1, keepdim=True))
    tolerance = dict(rtol=2e-2, atol=2e-2, check_dtype=False)
    torch.testing.assert_close(out.primal, plain, **tolerance)
    torch.testing.assert_close(out.tangent, slope, **tolerance)


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_dropout_draws_one_mask_the_one_of_the_plain_call(dims: int) -> None:
    layer = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[dims](0.5)
    x = torch.ones(4, 6, *[3] * dims)
    torch.manual_seed(0)
    plain = layer(x)
    torch.manual_seed(0)
    out = layer(Dual(x, 3 * x))
    assert torch.equal(out.primal, plain) and torch.equal(out.tangent, 3 * plain) and (plain == 0).any()


X = Dual(torch.ones(2, 4, 4), torch.ones(2, 4, 4))


@torch.library.custom_op("mmf_fast_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("mmf_fast_tests::total", mutates_args=())
def total(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs).sum(0)


@pytest.mark.parametrize("function", [
    lambda x: torch.ops.aten.relu(x), lambda x: torch.ops.aten.relu.default(x), lambda x: torch.ops.aten.cat([x, x]),
    double, lambda x: torch.ops.mmf_fast_tests.double(x), lambda x: total([torch.zeros(2), x]), total,
    lambda x: torch.cdist(x, x), lambda x: x.item(), lambda x: x.tolist(),
    lambda x: x.numpy(), lambda x: x.data, lambda x: x.grad, lambda x: x.backward(), lambda x: x.register_hook(print),
    lambda x: torch.nn.functional.linear_cross_entropy(x[0], x[0], torch.ones(4).long()), lambda x: bool(x),
    lambda x: nn.utils.rnn.pack_padded_sequence(x, [2, 2]),
    lambda x: x.scatter(0, (0 * x).long(), x, reduce="add"), lambda x: torch.normal(x, 1.0),
    lambda x: x.scatter_reduce(0, (0 * x).long(), x, reduce="prod"),
    lambda x: F.embedding(torch.tensor([0]), x[0], max_norm=1.0), lambda x: F.grid_sample(torch.ones(1, 1, 2, 2), x),
    lambda x: nn.MultiheadAttention(4, 2, add_bias_kv=True)(x, x, x), lambda x: x.no_such_method(),
    lambda x: torch.cov(x[0, 0], aweights=x[0, 0]),
    lambda x: F.batch_norm(x, x[0, 0], x[0, 0]), lambda x: (x + 0j).logcumsumexp(0),
])  # fmt: skip
def test_what_has_no_rule_is_loud(function: Callable[[Any], Any]) -> None:
    with pytest.raises((MissingRuleError, TypeError)):
        function(X)


def test_what_pytorch_differentiates_wrongly_in_the_graph_is_served_without_one_only() -> None:
    x, dx = torch.eye(3, dtype=torch.float64) + 0.1, torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(MissingRuleError, match="tangent_grad=False"):
        torch.det(Dual(x, dx))
    out = torch.det(DetachedDual(x, dx))
    assert torch.isfinite(out.tangent).all() and not out.tangent.requires_grad


@pytest.mark.parametrize("function", [
    lambda x: x.std(1), lambda x: x.norm(dim=1), lambda x: torch.linalg.norm(x, dim=1), lambda x: torch.linalg.norm(x),
    lambda x: F.normalize(x, dim=1, eps=0.1), lambda x: x.var(1), lambda x: torch.std_mean(x, 1)[0],
    *(lambda x, p=p: x.norm(p, dim=1) for p in (0.5, 1, 1.5, 3, torch.inf, -torch.inf)), lambda x: x.norm(3),
    lambda x: torch.linalg.norm(x, 3, dim=1), lambda x: torch.linalg.vector_norm(x, 3),
    lambda x: F.normalize(x, p=3, eps=0.1), lambda x: F.pairwise_distance(x, torch.zeros_like(x), 3, eps=0),
])  # fmt: skip
def test_at_the_origin_tangent_and_gradient_are_zero_or_finite(function: Callable[[Any], Any]) -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    out = function(Dual(x, torch.randn(2, 3, dtype=torch.float64)))
    assert torch.isfinite(out.tangent).all()
    assert torch.isfinite(torch.autograd.grad((out.primal + out.tangent).sum(), x)[0]).all()


@pytest.mark.parametrize("power", [torch.pow, torch.float_power, lambda x, n: x**n, lambda x, n: x.clone().pow_(n)])
@pytest.mark.parametrize("n", [-1.0, 0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.long])
def test_powers_of_negative_numbers_and_zero_have_a_second_derivative(
    power: Callable[[Any, Any], Any], n: float, dtype: torch.dtype
) -> None:
    x = torch.tensor([-1.5, 0.0, 2.0] if n >= 0 else [-1.5, -1.0, 2.0], dtype=torch.float64)
    for exponent in (torch.tensor(n, dtype=dtype), torch.full((3,), n, dtype=dtype), n):
        dx, leaf = torch.randn(3).double(), x.clone().requires_grad_()
        out = power(Dual(leaf, dx), exponent)
        (curvature,) = torch.autograd.grad(out.tangent.sum(), leaf)
        first = torch.zeros(3).double() if n == 0 else n * x ** (n - 1)
        second = torch.zeros(3).double() if n in (0, 1) else n * (n - 1) * x ** (n - 2)
        torch.testing.assert_close((out.primal, out.tangent, curvature), (x**n, first * dx, second * dx))


def test_a_constant_exponent_has_a_gradient_through_the_tangent() -> None:
    """d/dn of n x^(n-1) dx is x^(n-1) (1 + n log x) dx, also at n = 0."""
    x, dx = torch.rand(4).double() + 0.5, torch.randn(4).double()
    n = torch.tensor([-1.0, 0.0, 1.0, 2.5], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad((Dual(x, dx) ** n).tangent.sum(), n)
    torch.testing.assert_close(found, x ** (n.detach() - 1) * (1 + n.detach() * x.log()) * dx)


@pytest.mark.parametrize("p", [0.5, 1, 1.5, 3, 4.5, torch.inf])
def test_p_norms_at_a_distance_from_zero(p: float) -> None:
    """The tangent against a central difference, the gradient through it against one of that tangent; some x are 0."""
    x, dx, step = torch.randn(2, 4).double(), torch.randn(2, 4).double(), 1e-5
    if p > 3:
        x[1, 2:] = 0

    def slope(x: Tensor) -> Any:
        return F.normalize(Dual(x, dx), p=p).tangent

    def plain(x: Tensor) -> Tensor:
        return F.normalize(x, p=p)

    torch.testing.assert_close(slope(x), (plain(x + step * dx) - plain(x - step * dx)) / (2 * step))
    x.requires_grad_()
    g, b = torch.randn(2, 2, 4).double()
    (found,) = torch.autograd.grad((g * slope(x)).sum(), x)
    expected = (g * (slope(x + step * b) - slope(x - step * b))).sum() / (2 * step)
    torch.testing.assert_close((found * b).sum(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [[30.0, 88.0], [-500.0, 900.0, 3.0, 1.0], [88.0, 30.0, -60.0, 88.0]])
def test_running_sums_of_exponentials_of_any_spread(x: list[float], dtype: torch.dtype) -> None:
    """PyTorch's own forward derivative of [30, 88] is [1, 0]: dy_i is a mean of the dx_j, weighted by e^x_j."""
    value, dx = torch.tensor(x, dtype=dtype), torch.randn(len(x), dtype=dtype)
    leaf = value.clone().requires_grad_()
    out = torch.logcumsumexp(Dual(leaf, dx), 0)
    ones = torch.logcumsumexp(Dual(value, torch.ones_like(value)), 0)
    weights = [torch.softmax(value[: i + 1], 0) for i in range(len(x))]
    slope = torch.stack([(p * dx[: i + 1]).sum() for i, p in enumerate(weights)])
    curvature = sum(F.pad(p * (dx[: i + 1] - slope[i]), (0, len(x) - 1 - i)) for i, p in enumerate(weights))
    assert torch.equal(out.primal, torch.logcumsumexp(value, 0))
    torch.testing.assert_close((out.tangent, ones.tangent), (slope, torch.ones_like(value)))
    torch.testing.assert_close(torch.autograd.grad(out.tangent.sum(), leaf)[0], curvature)


def test_the_variance_of_one_element_is_nan_as_for_tensors() -> None:
    x = Dual(torch.ones(2, 1), torch.ones(2, 1))
    for function in (torch.var, torch.std):
        assert function(x, 1).primal.isnan().all()


def test_cosine_similarity_counts_its_dimension_after_broadcasting() -> None:
    a, b = torch.randn(1, 2, 3), torch.randn(2, 1, 3)
    for dim in (-2, 1, 0):
        out = F.cosine_similarity(Dual(a, a), b, dim)
        torch.testing.assert_close(out.primal, F.cosine_similarity(a, b, dim))


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


@pytest.mark.parametrize("then", [lambda y: y + 1, lambda y: X + y, lambda y: F.linear(y, torch.ones(4, 4)), torch.exp])
def test_after_an_autograd_function_the_next_operation_raises(then: Callable[[Any], Any]) -> None:
    """PyTorch has no hook at Function.apply, which returns the pair as a plain tuple: no later operation takes it."""
    with pytest.raises((TypeError, MissingRuleError)):
        then(Scale.apply(X))


@pytest.mark.parametrize("function", [
    torch.sign, torch.floor, torch.round, torch.trunc, lambda x: x > 0.5, lambda x: x // 2, lambda x: x >= 1,
    torch.zeros_like, torch.ones_like, lambda x: x.new_zeros(3), lambda x: x.argmax(-1), lambda x: x.detach(),
    lambda x: x.long(), lambda x: torch.isfinite(x), lambda x: torch.div(x, 2, rounding_mode="floor"),
])  # fmt: skip
def test_piecewise_constant_results_are_plain_tensors(function: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64)
    out = function(Dual(x, torch.randn_like(x)))
    assert type(out) is Tensor and tangent(out) is None
    assert torch.equal(primal(out), function(x))
    assert out.shape != x.shape or not out.is_floating_point() or out.equal(function(x + 1e-9)) or out.equal(x)
