"""What reaches a Dual only because a pass intercepts it: Dynamo's spellings, isinstance, rows, einops, checkpoints."""

from __future__ import annotations

import operator
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import einops
import einx
import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from einops.layers.torch import EinMix, Rearrange, Reduce
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves, tree_map

from mmf_fast import Dual, MissingRuleError, jvp, register_rule
from mmf_fast.forward import dual, interception

torch.manual_seed(0)
W = torch.randn(4, 4, dtype=torch.float64)
LAYERS = nn.Sequential(
    Rearrange("a b -> b a"),
    Reduce("(a c) b -> b c", "mean", c=2),
    EinMix("a b -> a c", weight_shape="b c", bias_shape="c", b=2, c=5),
).double()
LINEAR = nn.Linear(4, 4).double()
COMPILED = torch.compile(nn.Linear(4, 4).double(), backend="eager")


def packed(x: Any) -> Any:
    y, shapes = einops.pack([x, 2 * x], "* b")
    a, b = einops.unpack(y, shapes, "* b")
    return a * b


def rows(x: Any) -> Any:
    a, b, *rest = x
    total = sum(row * w for row, w in zip(x, W, strict=True))
    return torch.stack([a * b, *rest, total]) + torch.vstack(tuple(x))[1:2] - torch.stack(list(x))[0]


class Skipping(nn.Module):
    """Its hook returns one argument, not a tuple of them: a Dual in place of it would be two."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(lambda module, args: 2 * args[0])

    def forward(self, x: Any, skip: Any = None) -> Any:
        return x @ W if skip is None else x @ W + skip


HOOKED = Skipping()


def hooked(x: Any) -> Any:
    return HOOKED(x) * x


def received(x: Any) -> Any:
    """A running state, plain memory itself, is written into other plain memory; then its rows are asked for."""
    state, out = torch.zeros(4, dtype=x.dtype), torch.zeros(4, 4, dtype=x.dtype)
    for k in range(4):
        state.mul_(0.5).add_(x[k] * x[k])
        out[k] = state
    more = torch.zeros_like(out)
    more += out
    first, *rest = more
    return torch.stack([*rest, first]) * x / len(more)


def kinds(x: Any) -> Any:
    assert isinstance(x, (int, Tensor)) and isinstance(x, torch.Tensor | None)
    assert isinstance(x, Dual) or type(x) is Tensor
    assert not isinstance(x, (tuple, list)) and not isinstance(x, nn.Parameter) and isinstance(W, Tensor)
    assert isinstance(x.shape, tuple) and not isinstance(x.shape, Tensor)
    return x * x


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
    "isinstance": kinds,
    "rows": rows,
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
    "as_tensor": lambda x: torch.as_tensor(x) * torch.as_tensor(x, dtype=torch.float64) + torch.asarray(x),
    "functional_call": lambda x: torch.func.functional_call(LINEAR, {"weight": 2 * LINEAR.weight}, (x,)) ** 2,
    "compiled submodule": lambda x: COMPILED(x) ** 2,
    "len": lambda x: x.square().sum(0) / len(x),
    "names of numpy": lambda x: (
        torch.softmax(x, axis=-1) + x.log_softmax(axis=0) + torch.stack([x, x * x], axis=1).sum(axis=1)
        + torch.linalg.vector_norm(x, axis=1, keepdims=True) + torch.mul(x1=x, x2=x) + torch.cumprod(x, axis=0)
    ),
    "a hook that gives one argument": hooked,
    "rows of memory that received one": received,
}  # fmt: skip


def test_a_function_mapped_over_a_tree_meets_a_dual_as_a_leaf() -> None:
    """As a tensor would be: over its parts tanh would give no tangent of tanh."""
    x, dx = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    y, dy = jvp(lambda x: tree_map(torch.tanh, {"a": (x, W)})["a"][0], (x,), (dx,))
    torch.testing.assert_close(y, x.tanh())
    torch.testing.assert_close(dy, (1 - x.tanh() ** 2) * dx)
    assert tree_leaves(Dual(x, dx))[1] is dx  # outside a pass a Dual is what DDP and ZeRO look for


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
    originals = [getattr(owner, name) for owner, name, *_ in interception._REPLACED]

    def asks(x: Any) -> Any:
        assert torch.is_tensor is not originals[0] and isinstance is not originals[1]
        return jvp(lambda y: y * y if torch.is_tensor(y) else y, (x.primal,), (x.tangent,))[0] * x

    jvp(asks, (W,), (W,))
    with pytest.raises(ZeroDivisionError):
        jvp(lambda x: 1 // 0, (W,), (W,))
    assert originals == [getattr(owner, name) for owner, name, *_ in interception._REPLACED]
    assert type(einops._backends.get_backend(W)) is einops._backends.TorchBackend
    assert torch.equal(einops.rearrange(W, "a b -> b a"), W.T)


def test_a_pass_in_which_dynamo_first_traces_leaves_it_the_functions_of_torch() -> None:
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    TorchInGraphFunctionVariable._get_handlers.cache_clear()  # as in a new process
    torch._dynamo.reset()
    jvp(COMPILED, (W,), (W,))
    asks = torch.compile(lambda x: 2 * x if torch.is_tensor(x) else x, fullgraph=True, backend="eager")
    assert torch.equal(asks(W), 2 * W)


IMPORTED_IN_A_PASS = """
import sys, torch
from mmf_fast import jvp
assert "torch._dynamo" not in sys.modules
x = torch.rand(3)
jvp(lambda x: [x.asinh(), __import__("torch._dynamo")][0], (x,), (x,))  # as some of PyTorch's derivatives do
asks = torch.compile(lambda x: 2 * x if isinstance(x, torch.Tensor) else x, fullgraph=True, backend="eager")
assert torch.equal(asks(x), 2 * x)
"""


def test_dynamo_may_be_imported_in_a_pass() -> None:
    subprocess.run([sys.executable, "-c", IMPORTED_IN_A_PASS], check=True)


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


@pytest.mark.parametrize("function", [torch.stack, torch.cat, torch.hstack])
def test_a_dual_is_no_sequence_of_tensors(function: Any) -> None:
    for run in (function, lambda x: jvp(function, (x,), (x,))):
        with pytest.raises(TypeError):
            run(W)


class CheckpointFunction(torch.autograd.Function):
    """As in guided-diffusion, but for what is not looked at."""

    @staticmethod
    def forward(ctx: Any, run: Any, length: int, *args: Any) -> Any:
        ctx.run, ctx.inputs, ctx.parameters = run, args[:length], args[length:]
        with torch.no_grad():
            return run(*args[:length])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inputs = [x.detach().requires_grad_() for x in ctx.inputs]
        with torch.enable_grad():
            out = ctx.run(*inputs)
        return (None, None, *torch.autograd.grad(out, [*inputs, *ctx.parameters], grads))


def test_checkpoints_of_guided_diffusion_give_what_the_network_gives_without() -> None:
    def checked(x: Any) -> Any:
        return CheckpointFunction.apply(lambda y: LINEAR(y).sin(), 1, x, *LINEAR.parameters())

    found, right = (
        (*pair, *torch.autograd.grad(pair[1].square().sum(), list(LINEAR.parameters())))
        for pair in (jvp(net, (W,), (W,)) for net in (checked, lambda x: LINEAR(x).sin()))
    )
    torch.testing.assert_close(found, right)


def test_refusals_name_the_shortest_way_out() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    heads = W[None, None]
    for network, says in (
        (lambda x: x * x.sum().item(), r"item.*x\.detach\(\)\.item"),
        (lambda x: torch.tensor(x.tolist()), r"tolist.*x\.detach\(\)\.tolist"),
        (lambda x: flex_attention(x, x, x), "flex_attention.*scaled_dot_product_attention"),
    ):
        with pytest.raises(MissingRuleError, match=says):
            jvp(network, (heads,), (heads,))


def test_einx_is_right_and_refused_by_dynamo() -> None:
    def network(x: Any) -> Any:
        return einx.dot("a b, b c -> a c", einx.sum("a (b [c])", x, c=2), W[:2])

    assert torch.allclose(jvp(network, (W,), (2 * W,))[1], 2 * network(W))
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.TorchRuntimeError)):
        torch.compile(lambda x: jvp(network, (x,), (x,)), backend="eager", fullgraph=True)(W)


def test_torch_tensor_makes_a_constant() -> None:
    assert torch.equal(jvp(lambda x: torch.tensor(x) * x, (W,), (W,))[1], W * W)


@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
def test_torchscript_is_refused_by_name(module: bool) -> None:
    """It asks no mode, so plain memory that received a Dual would go in as a constant."""
    scripted = torch.jit.script(nn.Tanh() if module else scripted_tanh)

    def through_memory(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        total += x
        return scripted(total)

    for network in (scripted, through_memory):
        with pytest.raises(MissingRuleError, match="call the function that it was made of"):
            jvp(network, (W,), (W,))
    constant = torch.zeros_like(W)
    assert torch.equal(jvp(lambda x: scripted(constant) + x, (W,), (W,))[1], W)
    assert torch.equal(scripted(W), torch.tanh(W))  # outside of a pass


def scripted_tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


def test_einops_is_not_imported_for_its_sake() -> None:
    script = "import sys, torch, mmf_fast; mmf_fast.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),)); "
    subprocess.run([sys.executable, "-c", script + "assert 'einops' not in sys.modules"], check=True)


class Blocks(nn.Module):
    """Checkpointed blocks that drop, ask for types, write into buffers and return several tensors."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def block(self, layer: nn.Module, x: Any, scale: Any) -> tuple[Any, Any]:
        y = torch.zeros_like(x) if isinstance(x, Tensor) and torch.is_tensor(x) else None
        some = torch.dropout(layer(x).sin(), 0.4, self.training)[:, :2]
        if torch.compiler.is_compiling():  # Dynamo refuses what a pass notes of a buffer inside of a checkpoint
            y = F.pad(some, (0, 2))
        else:
            y[:, :2] = some  # type: ignore[index]
        return x + y * scale, scale * 2

    def nested(self, layer: nn.Module, x: Any, more: Any) -> list[Any]:
        x, scale = self.block(layer, x, *more["scales"])
        return [x, {"scales": (scale,)}]

    def forward(self, x: Any) -> Any:
        scale = x.sum().cos()
        for layer in self.layers:
            if self.use_reentrant is None:
                x, scale = self.block(layer, x, scale)
            elif self.use_reentrant:  # it takes nothing by name
                x, scale = checkpoint.checkpoint(self.block, layer, x, scale, use_reentrant=True)
            else:
                x, more = checkpoint.checkpoint(self.nested, layer, x, more={"scales": (scale,)}, use_reentrant=False)
                (scale,) = more["scales"]
        return x * scale


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("tangent_grad", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_give_what_the_network_gives_without(
    use_reentrant: bool, tangent_grad: bool, compiled: bool
) -> None:
    torch.manual_seed(0)
    plain, checked = Blocks(None).double(), Blocks(use_reentrant).double()
    checked.load_state_dict(plain.state_dict())

    def run(net: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        x, dx = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        both = lambda x, dx: jvp(net, (x,), (dx,), tangent_grad)  # noqa: E731
        y, dy = (torch.compile(both, fullgraph=True, backend="aot_eager") if compiled else both)(x, dx)
        loss = (y * y).sum() + (dy * dy).sum()
        grads = torch.autograd.grad(loss, [x, dx, *net.parameters()], allow_unused=True, materialize_grads=True)
        return [y, dy, *grads]

    for found, right in zip(run(checked), run(plain), strict=True):
        torch.testing.assert_close(found, right)
