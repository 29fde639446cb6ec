"""Activations with tangents, for every implementation: against torch.func.jvp of the functions written out."""

import math

import pytest
import torch
from support.operator_harness import check

from mmf_fast.ops.pointwise import activation


def silu(x):
    return x * torch.sigmoid(x)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FUNCTIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}


def run(act, x, dx, dtype, device, use=(True, True)):
    check(lambda p, d: activation(p[0], d[0], act), FUNCTIONS[act], [x], [dx], dtype, device, use)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", FUNCTIONS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 49), (2, 1023), (0, 4)], ids=str)
def test_any_shape(device, act, shape, dtype):
    x, dx = 3 * torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    run(act, x, dx, dtype, device)


@pytest.mark.parametrize("act", FUNCTIONS)
@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["primal", "tangent"])
def test_one_cotangent(device, act, use):
    run(act, torch.randn(5, 3).double(), torch.randn(5, 3).double(), torch.float64, device, use)


@pytest.mark.parametrize("act", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_huge_arguments_are_linear_or_zero(device, act, dtype):
    x = torch.tensor([-1e30, -1e4, -300.0, 300.0, 1e4, 1e30], dtype=dtype, device=device, requires_grad=True)
    y, dy = activation(x, torch.ones_like(x), act)
    assert y.tolist() == pytest.approx([0, 0, 0, *x.tolist()[3:]]) and dy.tolist() == pytest.approx([0, 0, 0, 1, 1, 1])
    assert torch.autograd.grad(y.sum() + dy.sum(), x)[0].tolist() == pytest.approx([0, 0, 0, 1, 1, 1])
    nan, _ = activation(
        torch.full((3,), math.nan, dtype=dtype, device=device), torch.ones(3, dtype=dtype).to(device), act
    )
    assert nan.isnan().all()


def test_channels_last_and_strided_arguments(device):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=device)
    for view in (x.to(memory_format=torch.channels_last), x.transpose(0, 2), x[..., ::2], x[:1].expand(4, 3, 4, 5)):
        dx = torch.randn(view.shape, dtype=view.dtype, device=device)
        y, dy = activation(view, dx, "silu")
        torch.testing.assert_close(y, silu(view), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dy, torch.func.jvp(silu, (view.clone(),), (dx.clone(),))[1], rtol=1e-12, atol=1e-12)


def test_gradcheck(device):
    for act in FUNCTIONS:
        x, dx = (torch.randn(4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(lambda x, dx, act=act: activation(x, dx, act), (x, dx), fast_mode=True)
