"""Schema, fake kernels, autograd registration and the choice of an implementation."""

import contextlib
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from mmf_fast.ops import attention, dispatch, gpu, group_norm, layer_norm, native, pointwise, sg_loss


def draw(*shapes, grad=True):
    return [torch.randn(s, requires_grad=grad) for s in shapes]


def samples():
    rows = draw((6, 5), (6, 5), (2, 5), (2, 5), (2, 5), (2, 5))
    image = draw((2, 4, 3, 3), (2, 4, 3, 3), (1, 4), (1, 4), (1, 4), (1, 4))
    flat = draw((3, 7), (3, 7))
    fixed = draw((3, 7), (3,), (), grad=False)
    q, dq = draw((2, 2, 5, 16), (2, 2, 5, 16))
    k, dk, v, dv = draw(*[(2, 2, 7, 16)] * 4)
    return {
        "layer norm": (layer_norm._operator, (*rows, False, 1e-5, True)),
        "layer norm without tangents": (
            layer_norm._operator,
            (rows[0], None, rows[2], None, None, None, True, 1e-5, False),
        ),
        "group norm": (group_norm._operator, (*image, 2, 1e-5, "silu", True)),
        "activation": (pointwise._operator, (*flat, "gelu_tanh", True)),
        "loss": (sg_loss._operator, (*flat, *fixed, 1.0, 1e-3, True)),
        "loss without tangent": (sg_loss._operator, (flat[0], None, *fixed, 1.0, 1e-3, False)),
        "attention": (attention._operator, (q, dq, k, dk, v, dv, None, False, 0.25, True)),
        "attention, detached": (
            attention._operator,
            (q, dq, k, dk, v, dv, torch.ones(2, 2, 5, 7) > 0, True, 0.25, False),
        ),
        "attention without tangents": (attention._operator, (q, None, k, None, v, None, None, False, 0.25, False)),
    }


@pytest.mark.parametrize("name", samples())
def test_registration_is_what_torch_expects(name):
    """Schema, autograd, fake kernels and tracing with dynamic shapes."""
    operator, args = samples()[name]
    torch.library.opcheck(operator.overload, args)


class Calls(TorchDispatchMode):
    """The operators that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", samples())
def test_a_call_past_the_dispatcher_is_one_through_it(name):
    """Values and gradients, bit for bit; who watches the dispatcher still sees the operator and its backward."""
    operator, args = samples()[name]
    inputs = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    with Calls() as calls:
        sum(y.square().sum() for y in operator(*args) if y.requires_grad).backward()
    assert {f"mmf_fast::{operator.name}", f"mmf_fast::{operator.name}_backward"} <= set(calls.seen)
    found = []
    for call in (operator, operator.overload):
        with torch.no_grad():
            outputs = list(call(*args))
        outputs += call(*args)
        watched = [y for y in outputs if y.requires_grad]
        received = torch.autograd.grad(sum(y.square().sum() for y in watched), inputs, allow_unused=True)
        found.append([*outputs, *received])
    for x, y in zip(*found, strict=True):
        assert x is y is None or (torch.equal(x, y) and x.requires_grad == y.requires_grad)


@pytest.mark.parametrize("name", samples())
def test_tensors_without_memory_have_shapes_alone(name):
    operator, args = samples()[name]
    for found, right in zip(
        operator(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args)), operator(*args), strict=True
    ):
        assert found.is_meta and (found.shape, found.dtype) == (right.shape, right.dtype)


def skip_without(kind):
    if kind == "native" and not native.available():
        pytest.skip(native.reason())
    if kind == "triton" and (not gpu.available() or torch.cuda.is_available()):
        pytest.skip("no interpreter")


@pytest.mark.parametrize("kind", ["native", "triton"])
@pytest.mark.parametrize("name", samples())
def test_numbers_that_are_stored_without_their_sign_have_it(name, kind, monkeypatch):
    """As those of z.conj().imag are, or of a cotangent that comes back from complex arithmetic."""
    skip_without(kind)
    monkeypatch.setenv("MMF_FAST_OPS", kind)
    operator, args = samples()[name]

    def of_negative(stored):
        return operator(*(stored(x.detach()) if isinstance(x, torch.Tensor) and x.requires_grad else x for x in args))

    torch.testing.assert_close(of_negative(torch._neg_view), of_negative(torch.neg), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", samples())
def test_a_trace_has_the_operator(name):
    operator, args = samples()[name]
    tensors = [x.detach() for x in args if isinstance(x, torch.Tensor)]

    def call(*given):
        left = iter(given)
        return tuple(operator(*(next(left) if isinstance(x, torch.Tensor) else x for x in args)))

    traced = torch.jit.trace(call, tuple(tensors), check_trace=False)
    assert f"mmf_fast::{operator.name}(" in str(traced.graph)


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    """As PyTorch's own are, wherever the program stands."""
    stands, launched = [0], []

    @contextlib.contextmanager
    def on(device):
        stands.append(device.index)
        yield
        stands.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: stands[-1])
    monkeypatch.setattr(torch.cuda, "device", on)
    launch = gpu.on_device_of_tensors(lambda *_: launched.append(stands[-1]))
    for device in ("cpu", "cuda:0", "cuda:1"):
        with FakeTensorMode():
            x = torch.empty(1, device=device)
        launch(None, x)
    assert launched == [0, 0, 1] and stands == [0]


@pytest.mark.parametrize("through", ("past", "through"))
@pytest.mark.parametrize("name", samples())
def test_a_second_derivative_is_refused_not_wrong(name, through):
    operator, args = samples()[name]
    operator = operator.overload if through == "through" else operator
    inputs = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    outputs = [y for y in operator(*args) if y.requires_grad]
    (gradient,) = torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative as a fused operator: set MMF_FAST_OPS=reference"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("kind", ["native", "triton"])
def test_every_operator_agrees_with_the_reference_on_what_opcheck_ran(kind):
    skip_without(kind)
    for name, (operator, args) in samples().items():
        op = operator.name
        ours = dispatch.implementation(op, kind)
        with torch.no_grad():
            for a, b in zip(ours(*args), dispatch.implementation(op, "reference")(*args), strict=True):
                torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_an_implementation_can_be_forced(monkeypatch):
    x = torch.zeros(2)
    monkeypatch.setenv("MMF_FAST_OPS", "reference")
    assert dispatch.serve("activation", x) is None
    monkeypatch.setenv("MMF_FAST_OPS", "fortran")
    with pytest.raises(ValueError, match="MMF_FAST_OPS is 'fortran': choose one of reference, native, triton"):
        dispatch.serve("activation", x)
    monkeypatch.delenv("MMF_FAST_OPS")
    assert dispatch.serve("activation", x.half()) is None
    assert dispatch.serve("activation", x, x.double()) is None and dispatch.serve("activation", x.int()) is None


def test_a_kind_that_is_not_here_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr(native, "op", lambda name: None)
    with pytest.raises(ValueError, match=r"activation has no native implementation here \(.*\): unset MMF_FAST_OPS"):
        dispatch.implementation("activation", "native")


def test_no_fused_operator_inside_transforms_or_traces():
    seen = []
    x = torch.randn(3)

    def look(x):
        seen.append(dispatch.serve("activation", x))
        return x * 1.0

    torch.func.jvp(look, (x,), (x,))
    torch.compile(look, backend="eager")(x)
    with forward_ad.dual_level():
        look(forward_ad.make_dual(x, x))
    assert seen == [None, None, None]


def test_the_command_prints_every_operator():
    out = subprocess.run([sys.executable, "-m", "mmf_fast", "ops"], capture_output=True, text=True, check=True).stdout
    assert all(f"  {name} " in out for name in dispatch.OPERATORS)
    assert "native:" in out and "triton:" in out
