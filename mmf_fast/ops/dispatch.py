"""Which implementation serves an operator, and the definition of operators.

An operator `mmf_fast::name` has up to three implementations with the same arguments:

    reference  plain PyTorch (ops/reference.py), its specification, on every device
    native     C++ (csrc/), on the CPU
    triton     on CUDA; on the CPU too under TRITON_INTERPRET=1, which tests use

MMF_FAST_OPS=reference|native|triton in the environment forces one, for the operators that have it. `serve` is the one
question that others ask: which kernel, C++ or Triton, serves these arguments, if any does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmf_fast.ops import gpu, native

__all__ = [
    "KINDS",
    "OPERATORS",
    "constant_to_dynamo",
    "define",
    "empty_or",
    "has_flags",
    "implementation",
    "is_channels_last",
    "layout_of",
    "one_dtype",
    "register_affine_norm",
    "serve",
]

KINDS = ("reference", "native", "triton")
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# Inductor cannot fuse the two products of attention, and its composed group norm with tangent takes four times as long
# as the C++ kernel (benchmarks/LOG.md). The others it fuses with their surroundings.
BEATS_INDUCTOR = {("attention", "native"), ("attention", "triton"), ("group_norm_silu", "native")}

_ORDINARY = {Tensor, torch.nn.Parameter, type(None)}
_DIRECT = _ORDINARY | {bool, int, float, str}  # arguments of a call that needs no dispatcher
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

_library = torch.library.Library("mmf_fast", "FRAGMENT")
_Function = TypeVar("_Function", bound=Callable)


class Operator:
    """An operator, called with the arguments of its schema by position.

    kinds: kind -> implementation, without native, which is looked up at the first call.
    takes: (kind, *arguments) -> whether a kernel of this kind takes them.
    overload: what the dispatcher calls, and torch.compile, torch.export and modes see.

    Eager calls on ordinary tensors go past the dispatcher: its Python layers take several times as long on the host as
    a small kernel does.
    """

    def __init__(self, name: str, kinds: dict[str, Callable[..., Any]], takes: Callable[..., bool]) -> None:
        self.name, self.kinds, self.takes = name, kinds, takes
        self.overload: Any = None
        self.function: Any = None

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not _is_direct(args):
            return self.overload(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self.function.apply(*args)
        return self.run(*args)

    def run(self, *args: Any) -> Any:
        return implementation(self.name, _kernel(self.name, args) or "reference")(*args)

    def differentiate(self, backward: Callable[..., Any], setup: Callable[..., None] | None = None) -> None:
        """The gradient, as torch.library.register_autograd takes it: setup(ctx, inputs, output), backward(ctx, *g)."""
        torch.library.register_autograd(self.overload, backward, setup_context=setup, lib=_library)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self.run(*args)
            if setup is not None:
                setup(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.function = type(self.name, (torch.autograd.Function,), methods)


def _is_direct(args: Sequence[Any]) -> bool:
    """Whether nobody but autograd has to see a call on these arguments, and their memory holds their values: on meta
    there is none, and the imaginary part of a conjugate is stored without its sign, which the dispatcher puts right."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None  # of torch.jit.trace
        and _DIRECT.issuperset(map(type, args))
        and not any(x.is_meta or x.is_neg() for x in args if isinstance(x, Tensor))
    )


OPERATORS: dict[str, Operator] = {}


def constant_to_dynamo(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result: torch.compile calls the function while it traces, and its result is a
    constant. Without importing Dynamo, which takes longer than importing torch, often for nothing."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # all that the decorator does
    return function


# ---- the choice ------------------------------------------------------------------------------------------------------


def serve(name: str, *args: Any) -> str | None:
    """The kind of kernel, "native" or "triton", that serves the operator on these arguments. None: compose it of torch
    functions.

    args: the first arguments of the operator in its order, None where one is absent; a Dual stands for its two tensors.

    None where only the reference would serve, where the kernels do not take the arguments, inside functorch transforms
    and levels of PyTorch's forward mode (an operator there would lose its tangent), and while torch.compile traces,
    unless the kernel is faster than what inductor makes of the composition.
    """
    flat: list[Any] = []
    for arg in args:
        if isinstance(arg, tuple):
            flat += (arg.primal, arg.tangent)  # type: ignore[attr-defined]
        else:
            flat.append(arg)
    if torch.compiler.is_compiling():
        kind = _kernel(name, flat)
        return kind if (name, kind) in BEATS_INDUCTOR else None
    transformed = forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    if transformed or not _ORDINARY.issuperset(map(type, flat)):
        return None
    return _kernel(name, flat)


def _kernel(name: str, args: Sequence[Any]) -> str | None:
    """The kind of kernel that takes these arguments, if any does."""
    first = None
    for x in args:
        if isinstance(x, Tensor):
            if x.layout is not torch.strided:
                return None
            if first is None and x.is_floating_point():
                first = x
    if first is None:
        return None
    kind = _kind(name, first.device.type, first.dtype)
    return kind if kind != "reference" and OPERATORS[name].takes(kind, *args) else None


@constant_to_dynamo
def _kind(name: str, device: str, dtype: torch.dtype) -> str:
    """The kind of implementation for tensors of this device type and dtype."""
    forced = os.environ.get("MMF_FAST_OPS")
    if forced:
        if forced not in KINDS:
            raise ValueError(f"MMF_FAST_OPS is {forced!r}: choose one of {', '.join(KINDS)}")
        return forced if _exists(name, forced) else "reference"
    if device == "cuda":
        return "triton" if gpu.available() and "triton" in OPERATORS[name].kinds else "reference"
    return "native" if device == "cpu" and dtype in CPU_DTYPES and native.op(name) else "reference"


def _exists(name: str, kind: str) -> bool:
    """Whether an operator has a kernel of this kind, or may have one in a library that is not here."""
    return kind in OPERATORS[name].kinds or (kind == "native" and not (native.available() and native.op(name) is None))


def one_dtype(kind: str, *args: Any) -> bool:
    """What most kernels take: tensors of one dtype."""
    return len({x.dtype for x in args if isinstance(x, Tensor)}) == 1


def implementation(name: str, kind: str) -> Callable[..., Any]:
    """One implementation of an operator. Raises ValueError, in one line, when this installation has none."""
    found = native.op(name) if kind == "native" else OPERATORS[name].kinds.get(kind)
    if found is None or (kind == "triton" and not gpu.available()):
        raise ValueError(f"{name} has no {kind} implementation here ({_why_not(name, kind)}): unset MMF_FAST_OPS")
    return found


def _why_not(name: str, kind: str) -> str:
    if kind == "native":
        return native.reason() or "it has no C++ kernel"
    return "Triton is not installed" if not gpu.available() else "it has no Triton kernel"


# ---- defining an operator --------------------------------------------------------------------------------------------


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    *,
    check: Callable[..., Any],
    takes: Callable[..., bool] = one_dtype,
) -> Operator:
    """Define the operator mmf_fast::<schema> and return it, to call and to give a gradient (Operator.differentiate).

    schema: "name(Tensor x, ...) -> ...". reference: its specification. fake: shapes and dtypes of the result.
    triton: the launcher. check: raises ValueError for arguments that these must not be called with (the C++ kernel
    checks by itself, in csrc). takes: (kind, *arguments) -> whether a kernel of this kind takes them; if not, the
    reference serves. The C++ kernel is torch.ops.mmf_fast_native.<name>, if there is one. All of them take the
    arguments of the schema by position.
    """
    name = schema.partition("(")[0]

    def checked(run: Callable[..., Any]) -> Callable[..., Any]:
        def after_check(*args: Any) -> Any:
            check(*args)
            return run(*args)

        return after_check

    kinds = {"reference": checked(reference)}
    if triton is not None:
        kinds["triton"] = checked(gpu.on_device_of_tensors(triton))
    OPERATORS[name] = operator = Operator(name, kinds, takes)
    _library.define(schema)
    _library.impl(name, operator.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmf_fast::{name}", fake, lib=_library)
    operator.overload = getattr(torch.ops.mmf_fast, name).default
    if name.endswith("_backward"):  # or its own derivative would be zero, with no more than a warning
        operator.differentiate(functools.partial(_no_second_derivative, name))
    return operator


def _no_second_derivative(name: str, *_: Any) -> Any:
    raise RuntimeError(
        f"{name.removesuffix('_backward')} has no second derivative as a fused operator: set MMF_FAST_OPS=reference"
    )


def register_affine_norm(operator: Operator, backward_operator: Operator) -> None:
    """The autograd formula of a norm (x, dx, gain, dgain, bias, dbias, *options, tangent_grad) -> (y, dy), from its
    backward operator (g, h, x, dx, gain, dgain, bias, dbias, *options) -> what each of the six receives."""

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        x, dx, gain, dgain, bias, dbias, *ctx.options, ctx.tangent_grad = inputs
        ctx.set_materialize_grads(False)
        if not ctx.tangent_grad:
            dx = dgain = dbias = None
        ctx.save_for_backward(x, dx, gain, dgain, bias, dbias)

    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple:
        x, dx, gain, dgain, bias, dbias = ctx.saved_tensors
        rest = (None,) * (len(ctx.options) + 1)
        h = h if ctx.tangent_grad else None
        if g is None and h is None:
            return (None,) * 6 + rest
        g, h = (None if c is None else layout_of(c, x) for c in (g, h))
        if h is None:
            dx = dgain = dbias = None
        g_x, *others = backward_operator(g, h, x, dx, gain, dgain, bias, dbias, *ctx.options)
        return (g_x, *(out if out.numel() else None for out in others), *rest)

    operator.differentiate(backward, setup)


# ---- for their launchers ---------------------------------------------------------------------------------------------


def has_flags(**tensors: Tensor | None) -> dict[str, bool]:
    """HAS_<name> flags of a Triton kernel."""
    return {f"HAS_{name}": tensor is not None for name, tensor in tensors.items()}


def empty_or(like: Tensor | None, x: Tensor) -> Tensor:
    """An output shaped like `like`, or an empty one for an absent argument (operators cannot return None)."""
    return x.new_empty(0) if like is None else torch.empty_like(like)


def layout_of(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x without gaps in memory: contiguous or channels-last, whichever it is already, or in the layout of `like`."""
    if like is not None:
        return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)
    if x.ndim in (4, 5) and not x.is_contiguous():
        return x.contiguous(memory_format=_CHANNELS_LAST[x.ndim]) if is_channels_last(x) else x.contiguous()
    return x.contiguous()


def is_channels_last(x: Tensor) -> bool:
    return x.ndim in (4, 5) and x.is_contiguous(memory_format=_CHANNELS_LAST[x.ndim]) and not x.is_contiguous()
