"""How functions that were written for tensors come to meet a Dual.

What torch hands to `Dual.__torch_function__` needs nothing from here. Four things do not arrive there by themselves:
what torch.compile spells in its own way, `torch.is_tensor`, `autograd.Function.apply`, and libraries that ask for the
type of a tensor (einops). `intercepted()` is the scope of one pass and cares for all of them; outside it nothing in the
process is changed.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmf_fast.forward.dual import DetachedDual, Dual, known_functions, primal
from mmf_fast.ops.dispatch import constant_to_dynamo

__all__ = ["intercepted", "operands_keep_their_order"]

# They take a Dual apart themselves, because it is a tuple, and must not take it for a tensor.
_LOOK_INTO_TUPLES = ("torch", "deepspeed", "mmf_fast")
_IS_TENSOR = torch.is_tensor
_APPLY: Any = torch.autograd.Function.__dict__["apply"]


@contextlib.contextmanager
def intercepted() -> Iterator[None]:
    """The scope in which a network is called on Duals."""
    _prepare()
    with _replacing(), Interception():
        yield


class Interception(TorchFunctionMode):
    """Sees every function of torch that the network calls, before anything else does."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # it looks for Duals in lists, but not in tuples
            duals = _duals([*args, *kwargs.values()])
            if duals:
                kind = DetachedDual if any([isinstance(x, DetachedDual) for x in duals]) else Dual
                return kind.__torch_function__(func, types, args, kwargs)
        return func(*args, **kwargs)


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
    return True


def _teach_dynamo() -> None:
    """`@` of what is not a tensor, which Dynamo lacks before PyTorch 2.14, and which functions can be overridden."""
    from torch._dynamo.variables import builtin
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


_passes = 0
_lock = threading.Lock()


@contextlib.contextmanager
def _replacing() -> Iterator[None]:
    """PyTorch lets nobody override torch.is_tensor and Function.apply: replace them while a pass is under way.

    Compiled code needs no replacement: Dynamo hands the one on, since it is one that Duals know, and refuses the other.
    """
    global _passes
    if torch.compiler.is_compiling():
        yield
        return
    with _lock:
        _passes += 1
        torch.is_tensor = _is_tensor  # type: ignore[assignment]
        torch.autograd.Function.apply = classmethod(_apply)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        with _lock:
            _passes -= 1
            if not _passes:
                torch.is_tensor = _IS_TENSOR
                torch.autograd.Function.apply = _APPLY  # type: ignore[method-assign]


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Function.apply would take a Dual for a constant and give a tuple; here it needs a rule: register_rule(cls)."""
    duals = [x for x in _duals([*args, *kwargs.values()]) if x.tangent is not None]
    if duals:
        kind = DetachedDual if any(isinstance(x, DetachedDual) for x in duals) else Dual
        return kind.__torch_function__(cls, (), args, kwargs)
    return _APPLY.__func__(cls, *map(primal, args), **kwargs)


def _is_tensor(obj: Any) -> bool:
    if not isinstance(obj, Dual):
        return isinstance(obj, Tensor)
    return torch.compiler.is_compiling() or _caller(2) not in _LOOK_INTO_TUPLES


def _caller(depth: int) -> str:
    """The package whose code called the function `depth - 1` frames up."""
    return sys._getframe(depth).f_globals.get("__name__", "").split(".")[0]
