"""How functions that were written for tensors come to meet a Dual.

What torch hands to `Dual.__torch_function__` needs nothing from here. Six things do not arrive there by themselves:
what torch.compile spells in its own way, and libraries that ask for the type of a tensor (teaching.py); plain tensors
that received a Dual (buffers.py); `torch.is_tensor` and `isinstance(x, torch.Tensor)`; `autograd.Function.apply`;
checkpoints; what torch.jit.script has made. `intercepted()` is the scope of one pass and cares for all of them; outside
it nothing in the process is changed.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from mmf_fast.forward.buffers import CURRENT, LIVE, WRITES, Buffers, using
from mmf_fast.forward.dual import (
    DETACH,
    DetachedDual,
    Dual,
    caller_looks_into_tuples,
    duals_in,
    looks_into_tuples,
    primal,
)
from mmf_fast.forward.missing import missing_rule_error
from mmf_fast.forward.teaching import still_builtin, teach

__all__ = ["intercepted"]

_METHODS = {f for f in map(Tensor.__dict__.get, dir(Tensor)) if callable(f)} | {
    f for f in vars(torch._C.TensorBase).values() if callable(f)
}  # which take no Dual as self
# Functions of a sequence of tensors, and of no tensor: they would take a Dual for a sequence of two.
_OF_SEQUENCES = {
    *(torch.cat, torch.concat, torch.concatenate, torch.stack),
    *(torch.hstack, torch.vstack, torch.dstack, torch.column_stack, torch.row_stack),
}

_CONVERSIONS = {torch.as_tensor, torch.asarray, torch.tensor}  # they would take a Dual for a sequence of numbers
_ALSO_WATCHED = _OF_SEQUENCES | _CONVERSIONS | set(DETACH)
_KINDS = {Dual, DetachedDual}


@contextlib.contextmanager
def intercepted(primals: Sequence[Any] = (), buffers: Buffers | None = None) -> Iterator[Buffers]:
    """The scope in which a network is called on Duals of these primals.

    buffers: those of the pass of which this is a part that runs again.
    """
    teach()
    with _replacing(), using(Buffers(primals) if buffers is None else buffers) as used, Interception():
        yield used


class Interception(TorchFunctionMode):
    """Sees every function of torch that the network calls, before anything else does."""

    leaves_rules_alone = True

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if LIVE or func in WRITES or func in _ALSO_WATCHED or torch.compiler.is_dynamo_compiling():
            return _call(func, types, args, kwargs or {})
        if len(types) == 1 and types[0] in _KINDS:  # whom torch would ask next, by a longer way
            return types[0].__torch_function__(func, types, args, kwargs)
        return func(*args, **kwargs) if kwargs else func(*args)


def _call(func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
    buffers, tracing = CURRENT.buffers, torch.compiler.is_dynamo_compiling()
    if func is tag_activation_checkpoint:
        return _traced_checkpoint(*args, **kwargs)
    if func in WRITES:
        _receive(buffers, args, kwargs)
    elif func in _OF_SEQUENCES and args and isinstance(args[0], Dual):
        args = (args[0].primal, *args[1:])  # PyTorch's error of it
    elif func in _CONVERSIONS and args and isinstance(args[0], Dual):
        if func is not torch.tensor:
            return args[0].to(**{name: x for name, x in kwargs.items() if x is not None}) if kwargs else args[0]
        args = (args[0].primal, *args[1:])  # a constant, which PyTorch makes of any tensor
    if buffers.tangents and func.__name__ != "__get__":
        args, kwargs = buffers.moving(args), buffers.moving_by_name(kwargs)
    if tracing or (buffers.tangents and func in _METHODS):  # Dynamo looks for Duals in lists, but not in tuples
        duals = duals_in([*args, *kwargs.values()])
        if duals:
            return kind_of(duals).__torch_function__(func, types, args, kwargs)
    if tracing and func is Tensor.unflatten:
        func = torch.unflatten  # which Dynamo traces
    out = func(*args, **kwargs)
    if func in DETACH:
        buffers.protected.append(out)
    return out


def kind_of(duals: Sequence[Dual]) -> type[Dual]:
    """The kind of what is computed from these Duals."""
    return DetachedDual if any([isinstance(x, DetachedDual) for x in duals]) else Dual


def _receive(buffers: Buffers, args: tuple, kwargs: dict) -> None:
    """Prepares a plain tensor, the first argument, for the Duals among the others."""
    others = [*args[1:], *kwargs.values()]
    if buffers.tangents:
        others = buffers.moving(others)  # another plain tensor, which has received one before
    duals = [x for x in duals_in(others) if x.tangent is not None]
    if duals and isinstance(args[0], Tensor):
        buffers.receive(args[0], kind_of(duals))


_MAY_HOLD_DUALS = _KINDS | {list, tuple}
_passes = 0
_lock = threading.Lock()


@contextlib.contextmanager
def _replacing() -> Iterator[None]:
    """What nobody can override is replaced while a pass is under way.

    Compiled code needs no replacement: Dynamo was taught, or refuses.
    """
    global _passes
    if torch.compiler.is_compiling():
        yield
        return
    with _lock:
        _passes += 1
        for owner, name, _, replacement in _REPLACED:
            setattr(owner, name, replacement)
    try:
        yield
    finally:
        with _lock:
            _passes -= 1
            if not _passes:
                for owner, name, original, _ in _REPLACED:
                    setattr(owner, name, original)
                still_builtin(_ISINSTANCE, _isinstance)


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Function.apply would take a Dual for a constant and give a tuple; here it needs a rule: register_rule(cls)."""
    if cls is _KEEPS or (not LIVE and not kwargs and _MAY_HOLD_DUALS.isdisjoint(map(type, args))):
        return _APPLY.__get__(None, cls)(*args)
    buffers = CURRENT.buffers
    if buffers.tangents:
        args, kwargs = buffers.moving(args), buffers.moving_by_name(kwargs)
    duals = [x for x in duals_in([*args, *kwargs.values()]) if x.tangent is not None]
    if not duals:
        return _APPLY.__get__(None, cls)(*map(primal, args), **kwargs)
    if cls is checkpoint.CheckpointFunction:  # use_reentrant=True, whose results are those of the other form
        function, preserve, *inputs = args
        return checkpoint.checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=preserve)
    if cls.__name__ == "CheckpointFunction" and callable(args[0]) and type(args[1]) is int:
        # that of guided-diffusion, which many have copied: (function, count of inputs, *inputs, *parameters)
        return checkpoint.checkpoint(args[0], *args[2 : 2 + args[1]], use_reentrant=False)
    return kind_of(duals).__torch_function__(cls, (), args, kwargs)


def _refusing(call: Any) -> Any:
    """TorchScript asks nobody: it would take plain memory that received a Dual for a constant."""

    def scripted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if duals_in(CURRENT.buffers.moving((*args, *kwargs.values()))):
            raise missing_rule_error(self.name, "TorchScript knows no Dual, call the function that it was made of")
        return call(self, *args, **kwargs)

    return scripted


def _recomputing(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What a checkpoint runs again in backward is a part of this pass."""
    buffers = CURRENT.buffers

    def again(*inputs: Any, **named: Any) -> Any:
        with intercepted(buffers=buffers):
            return function(*inputs, **named)

    return _CHECKPOINT(again, *args, **kwargs)


def _traced_checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A checkpoint under Dynamo, which takes and gives tensors in lists, tuples and dictionaries, but no Duals."""

    def again(*inputs: Any, **named: Any) -> Any:
        with Interception():
            return _apart(function(*_together(inputs), **_together(named)))

    with Interception():
        pass  # Dynamo lets a checkpoint change the modes only where they were changed before it
    return _together(tag_activation_checkpoint(again, *_apart(args), **_apart(kwargs)))


def _apart(x: Any) -> Any:
    if isinstance(x, Dual):
        return {_DETACHED: isinstance(x, DetachedDual), "primal": x.primal, "tangent": x.tangent}
    return _within(_apart, x)


def _together(x: Any) -> Any:
    if type(x) is dict and _DETACHED in x:
        return (DetachedDual if x[_DETACHED] else Dual)(x["primal"], x["tangent"])
    return _within(_together, x)


def _within(change: Any, x: Any) -> Any:
    if type(x) in (list, tuple):
        return type(x)([change(part) for part in x])
    return {name: change(part) for name, part in x.items()} if type(x) is dict else x


_DETACHED = "a Dual taken apart: is it detached?"


def _is_tensor(obj: Any) -> bool:
    if not _ISINSTANCE(obj, Dual):
        return _ISINSTANCE(obj, Tensor)
    return torch.compiler.is_compiling() or not caller_looks_into_tuples(2)


def _node_type(tree: Any) -> Any:
    """To torch.utils._pytree: a Dual is a leaf where foreign code maps a function over a tree, as a tensor would be."""
    if type(tree) in _KINDS and not torch.compiler.is_compiling():
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") == pytree.__name__:
            frame = frame.f_back
        if frame is None or not looks_into_tuples(frame.f_globals.get("__name__", "")):
            return Tensor
    return _NODE_TYPE(tree)


def _isinstance(obj: Any, kinds: Any) -> bool:
    """Of a Dual in foreign code: whether its primal is one of the kinds, or a Dual is. Dynamo was taught that."""
    if type(obj) in _KINDS and not torch.compiler.is_compiling() and not caller_looks_into_tuples(2):
        return _ISINSTANCE(obj.primal, kinds) or (_ISINSTANCE(obj, kinds) and not _ISINSTANCE((), kinds))
    return _ISINSTANCE(obj, kinds)


_ISINSTANCE = isinstance
_NODE_TYPE: Any = pytree._get_node_type
_APPLY: Any = torch.autograd.Function.__dict__["apply"]
_KEEPS = getattr(checkpoint, "_NoopSaveInputs", None)  # the inputs of a checkpoint, in PyTorch 2.11
_RECOMPUTING = "_checkpoint_without_reentrant_generator"
_RECOMPUTING += "_impl" * hasattr(checkpoint, f"{_RECOMPUTING}_impl")  # its name since PyTorch 2.14
_CHECKPOINT: Any = getattr(checkpoint, _RECOMPUTING)
_SCRIPTED: Any = (torch._C.ScriptFunction, torch._C.ScriptMethod)
_REPLACED: tuple[tuple[Any, str, Any, Any], ...] = (
    (torch, "is_tensor", torch.is_tensor, _is_tensor),
    (builtins, "isinstance", isinstance, _isinstance),
    (pytree, "_get_node_type", _NODE_TYPE, _node_type),
    (torch.autograd.Function, "apply", _APPLY, classmethod(_apply)),
    (checkpoint, _RECOMPUTING, _CHECKPOINT, _recomputing),
    *((kind, "__call__", kind.__call__, _refusing(kind.__call__)) for kind in _SCRIPTED),
)
