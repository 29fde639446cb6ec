"""The rule of attention: which path serves which arguments, and mmf_fast.attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmf_fast
from mmf_fast.forward.dual import DetachedDual, Dual
from mmf_fast.forward.rules import sdpa as rule
from mmf_fast.ops import native

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


def test_plain_tensors_are_pytorchs_attention():
    q, k, v = draw(3)
    for options in ({}, {"is_causal": True}, {"scale": 0.1}, {"attn_mask": torch.rand(9, 9) < 0.9}):
        torch.testing.assert_close(
            mmf_fast.attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options)
        )
