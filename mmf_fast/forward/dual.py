"""Forward mode as a data type: a `Dual` carries a primal and its tangent through an ordinary network.

    network(Dual(z, w), r, Dual(t, 1))  ->  Dual(u, du/dt),    du/dt = (d_z u) w + d_t u

Every torch function, operator and Tensor method called on a Dual looks up a rule (see forward/rules) that returns
the primal and the tangent of the result. There is no second copy of the model and no functorch level: to autograd,
torch.compile, DDP and ZeRO the pass is an ordinary forward call.

`Dual` keeps the tangent in the autograd graph (SG_1). `DetachedDual` computes it under `no_grad` (SG_0): the tangent
then costs one forward and saves nothing for backward. The choice travels with the data, so that a recomputed segment
(activation checkpointing) repeats the choice of its first run.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._guards import TracingContext

from mmf_fast.forward.buffers import CURRENT, LIVE, set_aside
from mmf_fast.forward.missing import MissingRuleError, missing_rule_error

__all__ = [
    "Value",
    "DETACH",
    "DetachedDual",
    "Dual",
    "duals_in",
    "known_functions",
    "laid_out_like",
    "looks_into_tuples",
    "no_tangent",
    "caller_looks_into_tuples",
    "primal",
    "register_rule",
    "tangent",
    "tangent_scope",
    "unwatched",
]

Value: TypeAlias = Any  # a Tensor or a Dual: which of the two is known when a rule is called, not before
Rule = Callable[..., tuple[Any, Any]]

# How eager mode and Dynamo spell operators between a Tensor and a Dual, and whether they swap the operands.
_OPERATORS = {
    "pow": (torch.pow, False),  # also the name of Tensor.__pow__ and operator.pow
    "__pow__": (torch.pow, False),
    "__floordiv__": (operator.floordiv, False),
    "__eq__": (operator.eq, False),
    "__rsub__": (operator.sub, True),
    "__rdiv__": (operator.truediv, True),
    "__rpow__": (torch.pow, True),
    "__rmatmul__": (operator.matmul, True),
    "__rfloordiv__": (operator.floordiv, True),
    "__rmod__": (operator.mod, True),
}
_ALIASES = {"axis": "dim", "keepdims": "keepdim", "x1": "input", "x2": "other"}  # numpy's names, which torch takes too
_NAME_AS_THEY_LIKE = (FunctionType, type, torch._ops.OpOverload, torch._ops.OpOverloadPacket)  # not written in C
DETACH = (torch.detach, Tensor.detach)
_RULES: dict[Any, Rule] = {}
_NO_TANGENT: set[Any] = {Tensor.__len__, Tensor.__repr__}  # a Dual has its own; of a plain tensor that received one


class Dual(NamedTuple):
    """A tensor and its directional derivative.

    primal: floating-point tensor of any shape.
    tangent: tensor of the same shape, or None for a symbolic zero.

    A NamedTuple, because DDP, FSDP and ZeRO look for tensors inside tuples. They, and this package, iterate over its
    two parts; everybody else over its rows, as of a tensor. `isinstance(x, torch.Tensor)` is True within a pass.
    """

    primal: Tensor
    tangent: Tensor | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tracing = torch.compiler.is_dynamo_compiling()
        if not tracing and TracingContext.try_get() is not None:
            # Dynamo did not see the Dual (inside a tuple, or a function that it thinks of as not overridable) and put
            # the call into its graph as a whole; it would take the result apart row by row.
            raise missing_rule_error(func, "torch.compile does not see this Dual, call the network by mmf_fast.jvp")
        if (tracing or LIVE) and CURRENT.buffers.tangents:
            args, kwargs = CURRENT.buffers.moving(args), CURRENT.buffers.moving_by_name(kwargs)
            with set_aside():
                out = cls.__torch_function__(func, types, args, kwargs)
                return out.clone() if func in DETACH else out  # in memory of its own, which has no tangent
        if getattr(func, "__name__", "") in _OPERATORS:
            func, swapped = _OPERATORS[func.__name__]
            args = args[::-1] if swapped else args
        if func in _NO_TANGENT or not _has_tangent(args, kwargs):
            return func(*map(_strip, args), **{name: _strip(value) for name, value in kwargs.items()})
        rule = _RULES.get(func)
        if rule is None:
            raise missing_rule_error(func)
        if kwargs.get("out") is not None:
            raise missing_rule_error(func, "a Dual cannot be written to out=; use the returned value")
        if "out" in kwargs:  # out=None, which functions written in Python pass on
            kwargs = {name: value for name, value in kwargs.items() if name != "out"}
        if kwargs and any([name in _ALIASES for name in kwargs]) and not isinstance(func, _NAME_AS_THEY_LIKE):
            kwargs = {_ALIASES.get(name, name): value for name, value in kwargs.items()}
        mode = _watching()
        if mode is None:
            return _paired(cls, func, rule(*args, **kwargs))
        torch._C._pop_torch_function_stack()  # `unwatched`, written out, since every call comes here
        try:
            return _paired(cls, func, rule(*args, **kwargs))
        finally:
            torch._C._push_on_torch_function_stack(mode)

    def __getattr__(self, name: str) -> Any:
        # Only names without a rule arrive here: methods with a rule are attributes of the class.
        method = getattr(Tensor, name, None)
        raise (
            missing_rule_error(method) if method is not None else MissingRuleError(f"a Dual has no attribute {name!r}")
        )

    def __setitem__(self, index: Any, value: Any) -> None:
        type(self).__torch_function__(Tensor.__setitem__, (), (self, index, value))

    def __len__(self) -> int:
        return len(self.primal)

    def __iter__(self) -> Iterator[Any]:
        if not torch.compiler.is_dynamo_compiling() and caller_looks_into_tuples(2):
            return tuple.__iter__(self)
        return iter(self.unbind(0))

    def __bool__(self) -> bool:
        raise MissingRuleError("the truth value of a Dual would drop its tangent; branch on x.primal instead")


def _metadata(name: str) -> property:
    return property(lambda self: getattr(self.primal, name))


for _name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad"):
    setattr(Dual, _name, _metadata(_name))
for _name in ("is_cpu", "is_cuda", "is_nested", "is_sparse", "is_quantized"):
    setattr(Dual, _name, _metadata(_name))
Dual.__array_ufunc__ = None  # type: ignore[attr-defined]  # numpy scalars leave arithmetic with a Dual to the Dual
Dual._make = classmethod(lambda cls, parts: cls(*parts))  # type: ignore  # the one of NamedTuple counts with len
Dual.__rdiv__ = lambda self, other: other / self  # type: ignore[attr-defined]
Dual.T = property(lambda self: self.t())  # type: ignore[attr-defined]
Dual.mT = property(lambda self: self.transpose(-2, -1))  # type: ignore[attr-defined]
Dual.H = Dual.mH = property(lambda self: self.adjoint())  # type: ignore[attr-defined]
Dual.real = property(lambda self: torch.real(self) if self.dtype.is_complex else self)  # type: ignore[attr-defined]
Dual.imag = property(lambda self: torch.imag(self))  # type: ignore[attr-defined]


class DetachedDual(Dual):
    """A Dual whose tangent is outside the autograd graph: SG_0, the tangent of MeanFlow."""

    __slots__ = ()


# They take a Dual apart themselves, because it is a tuple, and must not take it for a tensor. But Module.__call__ asks
# whether a hook returned one argument or a tuple of them.
_LOOK_INTO_TUPLES = ("torch", "deepspeed", "mmf_fast", "collections")
_BUT = ("torch.nn.modules.module",)


def looks_into_tuples(module: str) -> bool:
    """Whether to the code of this module a Dual is a tuple, not a tensor."""
    return module.split(".")[0] in _LOOK_INTO_TUPLES and module not in _BUT


def caller_looks_into_tuples(depth: int) -> bool:
    """The same of the code that called the function `depth - 1` frames up."""
    return looks_into_tuples(sys._getframe(depth).f_globals.get("__name__", ""))


def primal(x: Any) -> Any:
    """The primal of a Dual; anything else as it is."""
    return x.primal if isinstance(x, Dual) else x


def tangent(x: Any) -> Tensor | None:
    """The tangent of a Dual; None (a symbolic zero) for anything else."""
    return x.tangent if isinstance(x, Dual) else None


def duals_in(args: Any) -> list[Dual]:
    """The Duals among the arguments of a function of torch, which may hold sequences of tensors."""
    found = []
    for x in args:
        if isinstance(x, Dual):
            found.append(x)
        elif type(x) in (list, tuple):
            found += duals_in(x)
    return found


def tangent_scope(*args: Any) -> contextlib.AbstractContextManager:
    """The scope in which a rule computes its tangent: `no_grad` when an argument is a DetachedDual."""
    return torch.no_grad() if any(isinstance(x, DetachedDual) for x in args) else contextlib.nullcontext()


def register_rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Decorator: the rule of one or several torch functions (or Tensor methods, or operators of `torch.ops`).

    The rule is called with the arguments of the function (never `out`), at least one of them a Dual with a tangent,
    and returns `(y, dy)`: the result and its tangent, which is broadcast and converted to the shape and dtype of y.
    Compute `dy` inside `tangent_scope`:

        @register_rule(torch.sinc)
        def sinc(x):
            y = torch.sinc(x.primal)
            with tangent_scope(x):
                dy = x.tangent * (torch.cos(torch.pi * x.primal) - y) / x.primal
            return y, dy

    A registered method of Tensor becomes a method of Dual. A later registration replaces an earlier one.
    """

    def register(rule: Rule) -> Rule:
        for function in functions:
            _NO_TANGENT.discard(function)
            _RULES[function] = rule
            _add_method(function)
        return rule

    return register


def no_tangent(*functions: Any) -> None:
    """Declare functions whose result does not carry a tangent: comparisons, integer results, constants, metadata."""
    for function in functions:
        _NO_TANGENT.add(function)
        _add_method(function)


def known_functions() -> set[Any]:
    """The functions that take Duals: those with a rule and those without a tangent."""
    return {*_RULES, *_NO_TANGENT}


def _add_method(function: Any) -> None:
    name = getattr(function, "__name__", "")
    if getattr(Tensor, name, None) is not function:
        return
    if isinstance(function, FunctionType):  # Dynamo does not recognise a method written in Python as a key: norm, ...
        function = getattr(torch, name, function)

    def method(self: Dual, *args: Any, **kwargs: Any) -> Any:
        return type(self).__torch_function__(function, (), (self, *args), kwargs)

    method.__name__ = name
    setattr(Dual, name, method)


def _operator(name: str, reflected: bool = False) -> Callable[..., Any]:
    # operator.sub and its kin are the keys, because torch.sub(2, x) does not exist.
    function = getattr(operator, name)

    def method(self: Dual, other: Any) -> Any:
        operands = (other, self) if reflected else (self, other)
        return type(self).__torch_function__(function, (), operands)

    return method


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul", "mod", "floordiv"):
    setattr(Dual, f"__{_name}__", _operator(_name))
    setattr(Dual, f"__r{_name}__", _operator(_name, reflected=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Dual, f"__{_name}__", _operator(_name))
Dual.__format__ = lambda self, spec: format(self.primal, spec) if spec else str(self)  # type: ignore  # f"{h.mean():.3f}"
Dual.__hash__ = tuple.__hash__  # type: ignore[method-assign]  # defining __eq__ removed it
Dual.__getitem__ = lambda self, index: type(self).__torch_function__(Tensor.__getitem__, (), (self, index))  # type: ignore
setattr(Dual, "__neg__", lambda self: type(self).__torch_function__(torch.neg, (), (self,)))  # noqa: B010
setattr(Dual, "__pos__", lambda self: type(self).__torch_function__(torch.positive, (), (self,)))  # noqa: B010
Dual.__abs__ = lambda self: type(self).__torch_function__(torch.abs, (), (self,))  # type: ignore[attr-defined]


def _has_tangent(args: Any, kwargs: dict) -> bool:
    for x in (*args, *kwargs.values()):
        if isinstance(x, Dual):
            if x.tangent is not None:
                return True
        elif isinstance(x, (list, tuple)) and _has_tangent(x, {}):
            return True
    return False


def _strip(x: Any) -> Any:
    if isinstance(x, Dual):
        return x.primal
    if type(x) in (list, tuple):
        return type(x)(map(_strip, x))
    return x


class unwatched:
    """The calls of a rule are not the network's: the mode that watches those would cost more than the rule."""

    __slots__ = ("mode",)

    def __init__(self) -> None:
        self.mode = _watching()

    def __enter__(self) -> None:
        if self.mode is not None:
            torch._C._pop_torch_function_stack()

    def __exit__(self, *error: object) -> None:
        if self.mode is not None:
            torch._C._push_on_torch_function_stack(self.mode)


def _watching() -> Any:
    """The mode of interception.py, where it is the innermost one."""
    depth = torch._C._len_torch_function_stack()
    mode = torch._C._get_function_stack_at(depth - 1) if depth else None
    return mode if getattr(mode, "leaves_rules_alone", False) else None


def _paired(cls: type[Dual], func: Any, result: Any) -> Any:
    """What a rule returned, as Duals; a rule that is made of others returns them itself."""
    return result if isinstance(result, Dual) else _wrap(cls, func, *result)


def _wrap(cls: type[Dual], func: Any, y: Any, dy: Any) -> Any:
    """Pair results with tangents; results without one (indices, symbolic zeros) stay plain."""
    if dy is None or (isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex())):
        return y
    if isinstance(y, (list, tuple)):
        pairs = [_wrap(cls, func, y_i, dy_i) for y_i, dy_i in zip(y, dy, strict=True)]
        return pairs if type(y) is list else tuple(pairs) if type(y) is tuple else type(y)(pairs)
    # A rule may leave its tangent smaller (broadcasting) or of another dtype (promotion, autocast) than its primal.
    if dy.dtype != y.dtype:
        if dy.is_complex() and not y.is_complex():
            raise missing_rule_error(func, "its rule gives a real result a complex tangent, take the real part")
        dy = dy.to(y.dtype)
    return cls(y, laid_out_like(y, dy))


def laid_out_like(y: Tensor, dy: Tensor) -> Tensor:
    """dy in the shape and strides of y, so that reshape, contiguous and their kin view both or copy both."""
    dy = dy if dy.shape == y.shape else dy.expand(y.shape)
    strides = y.stride(), dy.stride()
    if strides[0] != strides[1] and any(a != b and n > 1 for a, b, n in zip(*strides, y.shape, strict=True)):
        dy = torch.empty_like(y).copy_(dy)
    return dy
