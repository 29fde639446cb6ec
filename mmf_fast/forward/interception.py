"""How functions that were written for tensors come to meet a Dual.

What torch hands to `Dual.__torch_function__` needs nothing from here. Five things do not arrive there by themselves:
what torch.compile spells in its own way; plain tensors that received a Dual (buffers.py); `torch.is_tensor` and
`isinstance(x, torch.Tensor)`; `autograd.Function.apply` and checkpoints; libraries that ask for the type of a tensor
(einops). `intercepted()` is the scope of one pass and cares for all of them; outside it nothing in the process is
changed.
"""

from __future__ import annotations

import builtins
import contextlib
import operator
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from mmf_fast.forward.buffers import CURRENT, LIVE, WRITES, Buffers, using
from mmf_fast.forward.dual import (
    DETACH,
    LOOK_INTO_TUPLES,
    DetachedDual,
    Dual,
    known_functions,
    missing_rule_error,
    package_of_caller,
    primal,
)
from mmf_fast.ops.dispatch import constant_to_dynamo

__all__ = ["intercepted", "operands_keep_their_order"]

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


@contextlib.contextmanager
def intercepted(primals: Sequence[Any] = (), buffers: Buffers | None = None) -> Iterator[Buffers]:
    """The scope in which a network is called on Duals of these primals.

    buffers: those of the pass of which this is a part that runs again.
    """
    _prepare()
    with _replacing(), using(Buffers(primals) if buffers is None else buffers) as used, Interception():
        yield used


class Interception(TorchFunctionMode):
    """Sees every function of torch that the network calls, before anything else does."""

    leaves_rules_alone = True

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if LIVE or func in WRITES or func in _ALSO_WATCHED or torch.compiler.is_dynamo_compiling():
            return _call(func, types, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)


def _call(func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
    buffers, tracing = CURRENT.buffers, torch.compiler.is_dynamo_compiling()
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
        duals = _duals([*args, *kwargs.values()])
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
    duals = [x for x in _duals([*args[1:], *kwargs.values()]) if x.tangent is not None]
    if duals and isinstance(args[0], Tensor):
        buffers.receive(args[0], kind_of(duals))


def _duals(args: Any) -> list[Dual]:
    """The Duals among the arguments of a function of torch, which may hold sequences of tensors."""
    found = []
    for x in args:
        if isinstance(x, Dual):
            found.append(x)
        elif type(x) in (list, tuple):
            found += _duals(x)
    return found


@constant_to_dynamo
def _prepare() -> bool:
    """What a pass needs of other libraries; runs while Dynamo traces, too. Each part is done once per process."""
    if "torch._dynamo" in sys.modules:
        _teach_dynamo()
    if "einops" in sys.modules:
        _teach_einops()
    if "torch.nn.attention.flex_attention" in sys.modules:
        _teach_flex_attention()
    return True


def _teach_dynamo() -> None:
    """`@` of what is not a tensor, which Dynamo lacks before PyTorch 2.14, which functions can be overridden, that a
    Dual is a tensor to networks, and which tensors share their memory."""
    from torch._dynamo.variables import builtin, tensor
    from torch._dynamo.variables.torch import get_overridable_functions

    def call_matmul(self: Any, tx: Any, a: Any, b: Any) -> Any:  # dual @ dual
        return a.call_method(tx, "__matmul__", [b], {})

    for product in (operator.matmul, operator.imatmul):
        if not hasattr(builtin.BuiltinVariable, f"call_{product.__name__}"):
            setattr(builtin.BuiltinVariable, f"call_{product.__name__}", call_matmul)
            builtin.BuiltinVariable.call_function_handler_cache.clear()  # it remembers what it could not do
        # dual @ tensor; without this entry Dynamo swaps the operands and still says Tensor.matmul
        builtin.BUILTIN_TO_TENSOR_RFN_MAP.setdefault(product, Tensor.__rmatmul__)
    get_overridable_functions().update(known_functions())
    if builtin.BuiltinVariable.call_isinstance.__module__ != __name__:
        _teach_isinstance(builtin.BuiltinVariable)
        _teach_memory(tensor.UntypedStorageVariable, tensor.TensorVariable)


def _teach_isinstance(variable: Any) -> None:
    original = variable.call_isinstance

    def call_isinstance(self: Any, tx: Any, arg: Any, kinds: Any) -> Any:
        kind = getattr(arg, "tuple_cls", None)
        if kind in (Dual, DetachedDual) and tx.f_globals.get("__name__", "").split(".")[0] not in LOOK_INTO_TUPLES:
            named = kinds.as_python_constant()
            is_one = issubclass(Tensor, named) or (issubclass(kind, named) and not issubclass(tuple, named))
            return type(arg).build(tx, is_one)
        return original(self, tx, arg, kinds)

    variable.call_isinstance = call_isinstance
    variable.call_function_handler_cache.clear()


def _teach_memory(storage: Any, tensor: Any) -> None:
    original = storage.var_getattr

    def var_getattr(self: Any, tx: Any, name: str) -> Any:
        return self.build(tx, self.example_value._cdata) if name == "_cdata" else original(self, tx, name)

    def storage_offset(self: Any, tx: Any) -> Any:
        offset = self.as_proxy().node.meta["example_value"].storage_offset()
        return self.build(tx, offset) if isinstance(offset, int) else None  # None: as without this

    storage.var_getattr, tensor.method_storage_offset = var_getattr, storage_offset


@constant_to_dynamo
def operands_keep_their_order() -> bool:
    """Whether Dynamo tells dual @ tensor from tensor @ dual, which it does once it was taught."""
    from torch._dynamo.variables import builtin

    return operator.matmul in builtin.BUILTIN_TO_TENSOR_RFN_MAP


def _teach_einops() -> None:
    """einops finds its backend by the type of a tensor. The name under which it remembers ours must not be "torch":
    plain tensors would be served by it, and no longer be known, in the whole process."""
    backends: Any = sys.modules["einops._backends"]
    if "mmf_fast" in backends._loaded_backends:
        return

    class DualBackend(backends.TorchBackend):
        framework_name = "mmf_fast"

        def is_appropriate_type(self, tensor: Any) -> bool:
            return isinstance(tensor, Dual)

    backends._loaded_backends[DualBackend.framework_name] = DualBackend()
    for kind in (Dual, DetachedDual):  # now, since Dynamo cannot trace the search
        backends.get_backend(kind(torch.empty(0), None))


def _teach_flex_attention() -> None:
    """Its refusal would come out of a compilation of its own, without a name."""
    module: Any = sys.modules["torch.nn.attention.flex_attention"]
    original = module._validate_sdpa_input
    if original.__module__ == __name__:
        return

    def validate(*args: Any, **kwargs: Any) -> Any:
        if _duals([*args, *kwargs.values()]):
            fix = "use F.scaled_dot_product_attention, with what score_mod adds as its attn_mask"
            raise missing_rule_error(module.flex_attention, fix)
        return original(*args, **kwargs)

    module._validate_sdpa_input = validate


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


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Function.apply would take a Dual for a constant and give a tuple; here it needs a rule: register_rule(cls)."""
    buffers = CURRENT.buffers
    if buffers.tangents:
        args, kwargs = buffers.moving(args), buffers.moving_by_name(kwargs)
    duals = [x for x in _duals([*args, *kwargs.values()]) if x.tangent is not None]
    if not duals:
        return _APPLY.__func__(cls, *map(primal, args), **kwargs)
    if cls is checkpoint.CheckpointFunction:  # use_reentrant=True, whose results are those of the other form
        function, preserve, *inputs = args
        return checkpoint.checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=preserve)
    if cls.__name__ == "CheckpointFunction" and callable(args[0]) and type(args[1]) is int:
        # that of guided-diffusion, which many have copied: (function, count of inputs, *inputs, *parameters)
        return checkpoint.checkpoint(args[0], *args[2 : 2 + args[1]], use_reentrant=False)
    return kind_of(duals).__torch_function__(cls, (), args, kwargs)


def _recomputing(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What a checkpoint runs again in backward is a part of this pass."""
    buffers = CURRENT.buffers

    def again(*inputs: Any, **named: Any) -> Any:
        with intercepted(buffers=buffers):
            return function(*inputs, **named)

    return _CHECKPOINT(again, *args, **kwargs)


def _is_tensor(obj: Any) -> bool:
    if not _ISINSTANCE(obj, Dual):
        return _ISINSTANCE(obj, Tensor)
    return torch.compiler.is_compiling() or package_of_caller(2) not in LOOK_INTO_TUPLES


def _isinstance(obj: Any, kinds: Any) -> bool:
    """Of a Dual in foreign code: whether its primal is one of the kinds, or a Dual is."""
    if type(obj) in (Dual, DetachedDual) and package_of_caller(2) not in LOOK_INTO_TUPLES:
        return _ISINSTANCE(obj.primal, kinds) or (_ISINSTANCE(obj, kinds) and not _ISINSTANCE((), kinds))
    return _ISINSTANCE(obj, kinds)


_ISINSTANCE = isinstance
_APPLY: Any = torch.autograd.Function.__dict__["apply"]
_CHECKPOINT: Any = checkpoint._checkpoint_without_reentrant_generator
_REPLACED: tuple[tuple[Any, str, Any, Any], ...] = (
    (torch, "is_tensor", torch.is_tensor, _is_tensor),
    (builtins, "isinstance", isinstance, _isinstance),
    (torch.autograd.Function, "apply", _APPLY, classmethod(_apply)),
    (checkpoint, "_checkpoint_without_reentrant_generator", _CHECKPOINT, _recomputing),
)
