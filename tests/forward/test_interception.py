"""What reaches a Dual only because a pass intercepts it: Dynamo's spellings, torch.is_tensor, einops, numpy scalars."""

from __future__ import annotations

import operator
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops.layers.torch import EinMix, Rearrange, Reduce
from torch import Tensor, nn

from mmf_fast import MissingRuleError, jvp, register_rule
from mmf_fast.forward import dual

torch.manual_seed(0)
W = torch.randn(4, 4, dtype=torch.float64)
LAYERS = nn.Sequential(
    Rearrange("a b -> b a"),
    Reduce("(a c) b -> b c", "mean", c=2),
    EinMix("a b -> a c", weight_shape="b c", bias_shape="c", b=2, c=5),
).double()


def packed(x: Any) -> Any:
    y, shapes = einops.pack([x, 2 * x], "* b")
    a, b = einops.unpack(y, shapes, "* b")
    return a * b


SPELLINGS: dict[str, Callable[[Any], Any]] = {
    "dual @ dual": lambda x: x @ x.T,
    "dual @ tensor": lambda x: x @ W,
    "tensor @ dual": lambda x: W @ x,
    "dual - tensor": lambda x: x * x - W,
    "tensor - dual": lambda x: W - x * x,
    "number / dual": lambda x: 2 / (x * x + 1) // 0.1 + 1 / (3 + x),
    "operator.matmul": lambda x: operator.matmul(W, x),
    "torch.cat of a tuple": lambda x: torch.cat((x, W, x)),
    "torch.cat by name": lambda x: torch.cat(tensors=(x, x), dim=1),
    "torch.stack of a tuple": lambda x: torch.stack((W, x)),
    "torch.einsum of a tuple": lambda x: torch.einsum("ab,bc->ac", (x, x)),
    "F.sigmoid": F.sigmoid,
    "F.hardswish": F.hardswish,
    "F.hardsigmoid": F.hardsigmoid,
    "torch.is_tensor": lambda x: x * x if torch.is_tensor(x) else torch.tensor([x]),
    "rearrange": lambda x: einops.rearrange(x, "a (b c) -> c b a", c=2) ** 2,
    "repeat": lambda x: einops.repeat(x, "a b -> a b c", c=2) ** 2,
    "reduce": lambda x: einops.reduce(x, "a b -> a", "max"),
    "einops.einsum": lambda x: einops.einsum(x, W, x, "a b, b c, c d -> a d"),
    "rearrange of a list": lambda x: einops.rearrange([x, x * x], "n a b -> a (n b)"),
    "pack and unpack": packed,
    "einops layers": LAYERS,
    "numpy scalar on the left": lambda x: np.float64(2.0) * x**2 + np.float64(1.0),
    "numpy scalar on the right": lambda x: x**2 / np.float64(2.0),
    "shape unpacked": lambda x: (x * x).reshape(*x.shape[:1], 2, *[n // 2 for n in x.shape[1:]]),
    "len": lambda x: x.square().sum(0) / len(x),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_pass_sees_it_eager_and_compiled(name: str) -> None:
    torch._dynamo.reset()
    function = SPELLINGS[name]

    def both(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(function, (x,), (dx,))

    x, dx = (torch.randn(4, 4, dtype=torch.float64) for _ in range(2))
    step = 1e-5 * dx  # central differences, whose error is the third derivative times 1e-10
    expected = function(x), (function(x + step) - function(x - step)) / 2e-5
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for way in (both, compiled):
        torch.testing.assert_close(way(x, dx), expected, rtol=1e-7, atol=1e-7)


def test_outside_a_pass_the_process_is_as_it_was() -> None:
    original = torch.is_tensor

    def asks(x: Any) -> Any:
        assert torch.is_tensor is not original
        return jvp(lambda y: y * y if torch.is_tensor(y) else y, (x.primal,), (x.tangent,))[0] * x

    jvp(asks, (W,), (W,))
    with pytest.raises(ZeroDivisionError):
        jvp(lambda x: 1 // 0, (W,), (W,))
    assert torch.is_tensor is original
    assert type(einops._backends.get_backend(W)) is einops._backends.TorchBackend
    assert torch.equal(einops.rearrange(W, "a b -> b a"), W.T)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def test_an_autograd_function_is_refused_by_name_wherever_its_result_goes() -> None:
    original = torch.autograd.Function.__dict__["apply"]
    for then in (lambda y: y, lambda y: W, lambda y: y[0] + y[1]):
        with pytest.raises(MissingRuleError, match="Doubled.*register_rule"):
            jvp(lambda x, then=then: then(Doubled.apply(x * x)), (W,), (W,))
    y, dy = jvp(lambda x: x * Doubled.apply(W), (W,), (W,))  # of plain tensors it is what it was
    assert torch.equal(y, 2 * W * W) and torch.equal(dy, y)
    assert torch.autograd.Function.__dict__["apply"] is original


def test_an_autograd_function_may_have_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual, "_RULES", dict(dual._RULES))
    register_rule(Doubled)(lambda x: (Doubled.apply(x.primal), 2 * x.tangent))
    assert torch.equal(jvp(lambda x: Doubled.apply(x) * 3, (W,), (W,))[1], 6 * W)


def test_einops_is_not_imported_for_its_sake() -> None:
    script = "import sys, torch, mmf_fast; mmf_fast.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),)); "
    subprocess.run([sys.executable, "-c", script + "assert 'einops' not in sys.modules"], check=True)
