"""The rule of attention: which path serves which arguments, and mmf_fast.attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode

import mmf_fast
from mmf_fast import jvp
from mmf_fast.forward.dual import DetachedDual, Dual
from mmf_fast.forward.rules import sdpa as rule
from mmf_fast.ops import native
from mmf_fast.ops.attention import attention_tangent

needs_native = pytest.mark.skipif(not native.available(), reason=native.reason() or "-")


def draw(count: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 3, 9, 8, dtype=dtype, requires_grad=True) for _ in range(count)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """tangent_grad of every call of the operator."""
    found: list[bool] = []
    operator = rule.dual_attention

    def recorded(*args, **kwargs):
        found.append(kwargs["tangent_grad"])
        return operator(*args, **kwargs)

    monkeypatch.setattr(rule, "dual_attention", recorded)
    return found


@needs_native
@pytest.mark.parametrize("kind", [Dual, DetachedDual])
def test_the_operator_serves_duals_and_agrees_with_the_composition(kind, calls, monkeypatch):
    arguments = draw()
    mask = torch.rand(9, 9) < 0.7

    def run() -> list[Tensor]:
        q, k, v = (kind(x, dx) for x, dx in zip(arguments[:3], arguments[3:], strict=True))
        out = mmf_fast.attention(q, k, v, mask, scale=0.3)
        y, dy = out.primal, out.tangent
        loss = y.sum() + dy.sum() if kind is Dual else y.sum()
        return [y, dy, *torch.autograd.grad(loss, arguments, allow_unused=True, materialize_grads=True)]

    fused = run()
    assert calls == [kind is Dual]
    monkeypatch.setenv("MMF_FAST_OPS", "reference")
    torch.testing.assert_close(fused, run())
    assert len(calls) == 1 and fused[1].requires_grad == (kind is Dual)


@needs_native
def test_a_detached_tangent_saves_what_plain_attention_saves(calls):
    sizes = []
    q, k, v, *tangents = draw()
    duals = [DetachedDual(x, dx) for x, dx in zip((q, k, v), tangents, strict=True)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        F.scaled_dot_product_attention(*duals)
        dual, sizes[:] = sum(sizes), []
        F.scaled_dot_product_attention(q, k, v)
    assert calls == [False] and dual <= sum(sizes)


def test_masks_that_want_a_gradient_are_composed(calls):
    q, k, v, dq = draw(4)
    bias = torch.randn(9, 9, dtype=torch.float64, requires_grad=True)
    y = mmf_fast.attention(Dual(q, dq), k, v, bias)
    assert not calls and torch.autograd.grad(y.tangent.sum() + y.primal.sum(), bias)[0].any()


@needs_native
def test_autocast_takes_the_operator_to_its_dtype(calls):
    q, k, v, dq = draw(4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mmf_fast.attention(Dual(q, dq), k, v)
        expected = mmf_fast.attention(q, k, v)
    assert calls == [True] and y.dtype == y.tangent.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y.primal, expected, rtol=2e-2, atol=4e-3)  # SDPA keeps its weights in bfloat16


MASK = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
ADDITIVE = torch.arange(9.0, dtype=torch.float64).cos().view(3, 3).masked_fill(~MASK, -torch.inf)


@pytest.mark.parametrize("mode", ["dual", "func"])
@pytest.mark.parametrize("operators", ["", "reference"])
@pytest.mark.parametrize("case", ["boolean", "additive", "learned", "dropout", "additive dropout", "moving mask"])
def test_rows_that_attend_to_nothing_are_zero(case, operators, mode, monkeypatch):
    """As of PyTorch's attention, which gives values and, by differences, tangents and gradients through them."""
    monkeypatch.setenv("MMF_FAST_OPS", operators)
    mask = MASK if case in ("boolean", "dropout") else ADDITIVE.clone().requires_grad_(case == "learned")
    x, dx, ddx = (torch.randn(3, 2, 3, 4, dtype=torch.float64) for _ in range(3))
    step, g = 1e-5, torch.randn(2, 3, 4, dtype=torch.float64)

    def network(x):
        torch.manual_seed(1)
        bias = mask + x[0].sum(-1)[..., None] if case == "moving mask" else mask
        return F.scaled_dot_product_attention(*x, bias, dropout_p=0.5 * case.endswith("dropout"))

    def slope(x):
        return jvp(network, (x,), (dx,), mode=mode)

    y, dy = slope(x.requires_grad_())
    (found,) = torch.autograd.grad((g * dy).sum(), x)
    x, y, dy = x.detach(), y.detach(), dy.detach()
    assert not y[:, 1].any() and not dy[:, 1].any()
    torch.testing.assert_close(y, network(x).detach())
    difference = (network(x + step * dx) - network(x - step * dx)).detach() / (2 * step)
    torch.testing.assert_close(dy, difference, rtol=1e-7, atol=1e-7)
    expected = (g * (slope(x + step * ddx)[1] - slope(x - step * ddx)[1])).sum() / (2 * step)
    torch.testing.assert_close((found * ddx).sum(), expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("masked_rows", [False, True])
def test_attention_weights_are_those_of_pytorch_nan_where_a_row_attends_to_nothing(masked_rows):
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).double(), torch.randn(2, 3, 8).double()
    padding = torch.tensor([[masked_rows] * 3, [False, False, True]])
    for need_weights in (True, False):
        options = dict(key_padding_mask=padding, need_weights=need_weights)
        expected, out = layer(x, x, x, **options), layer(*[Dual(x, x)] * 3, **options)
        torch.testing.assert_close(out[0].primal, expected[0], equal_nan=True)
        assert torch.equal(out[0].tangent.isnan(), expected[0].isnan())


class _OneDtype(TorchDispatchMode):
    """What CUDA demands of the derivative of softmax, and the CPU does not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._softmax_backward_data.default:
            assert args[0].dtype == args[1].dtype
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask", [None, MASK, ADDITIVE.float()], ids=["none", "boolean", "additive"])
def test_under_autocast_the_composition_keeps_to_one_dtype(mask, monkeypatch):
    monkeypatch.setenv("MMF_FAST_OPS", "reference")
    q, k, v, dq = (torch.randn(2, 3, 4) for _ in range(4))
    with torch.autocast("cpu", torch.bfloat16), _OneDtype():
        F.scaled_dot_product_attention(Dual(q, dq), k, v, mask)
        attention_tangent(q, k, v, dq, None, None, mask=mask)


def test_plain_tensors_are_pytorchs_attention():
    q, k, v = draw(3)
    for options in ({}, {"is_causal": True}, {"scale": 0.1}, {"attn_mask": torch.rand(9, 9) < 0.9}):
        torch.testing.assert_close(
            mmf_fast.attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options)
        )


@pytest.mark.parametrize("mode", ["dual", "func"])
@pytest.mark.parametrize("count", [4, 7])
def test_a_causal_bias_is_the_mask_that_it_stands_for(mode: str, count: int) -> None:
    """PyTorch's object for it is a tensor over memory that nobody wrote."""
    q, dq, k, dk = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (4, 4, count, count))
    lower, upper = torch.ones(4, count, dtype=torch.bool).tril(count - 4), torch.ones(4, count, dtype=torch.bool).tril()
    for bias, mask in ((causal_lower_right(4, count), lower), (causal_upper_left(4, count), upper)):
        (y, dy), (expected, d_expected) = (
            jvp(lambda q, k, m=m: F.scaled_dot_product_attention(q, k, k, attn_mask=m), (q, k), (dq, dk), mode=way)
            for m, way in ((bias, mode), (mask, "dual"))
        )
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(dy, d_expected)
