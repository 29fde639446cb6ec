"""What other libraries are told of Duals, because they ask nobody: Dynamo, einops and flex_attention."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import Tensor

from mmf_fast.forward.dual import DetachedDual, Dual, duals_in, known_functions, looks_into_tuples
from mmf_fast.forward.missing import missing_rule_error
from mmf_fast.ops.dispatch import constant_to_dynamo

__all__ = ["operands_keep_their_order", "still_builtin", "teach"]


@constant_to_dynamo
def teach() -> bool:
    """Tells the libraries that are loaded what a Dual is; runs while Dynamo traces, too. Each is told once per
    process."""
    if "torch._dynamo" in sys.modules:
        _teach_dynamo()
    if "einops" in sys.modules:
        _teach_einops()
    if "torch.nn.attention.flex_attention" in sys.modules:
        _teach_flex_attention()
    return True


def still_builtin(original: Any, replacement: Any) -> None:
    """Dynamo notes the builtin functions when it is imported. In a pass, where PyTorch may do so for a derivative, it
    notes what replaces one there, and would refuse to trace the original in the whole process."""
    known = getattr(sys.modules.get("torch._dynamo.trace_rules"), "_builtin_function_ids", None)
    if known is not None and id(original) not in known():
        known.remove(id(replacement))
        known.add(id(original))
        known.function_names[id(original)] = f"builtins.{original.__name__}"


def _teach_dynamo() -> None:
    """`@` of what is not a tensor, which Dynamo lacks before PyTorch 2.14, which functions can be overridden, that a
    Dual is a tensor to networks, and which tensors share their memory."""
    from torch._dynamo.variables import builtin, tensor, user_defined
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable, get_overridable_functions

    # Dynamo notes PyTorch's functions when it first traces. In a pass, where a network compiles a part of itself, it
    # would note what replaces `torch.is_tensor` there, and know the original no more.
    TorchInGraphFunctionVariable._get_handlers()

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
        _teach_hasattr(user_defined.UserDefinedClassVariable)
        _teach_memory(tensor.UntypedStorageVariable, tensor.TensorVariable)
        if hasattr(tensor.TensorVariable, "mp_ass_subscript_impl"):
            _teach_assignment(tensor.TensorVariable)


def _teach_isinstance(variable: Any) -> None:
    original = variable.call_isinstance

    def call_isinstance(self: Any, tx: Any, arg: Any, kinds: Any) -> Any:
        kind, module = getattr(arg, "tuple_cls", None), tx.f_globals.get("__name__", "")
        if module == f"{__package__}.interception":  # what replaces isinstance in a pass asks for the frame before it
            module = (tx.parent or tx).f_globals.get("__name__", "")
        if kind in (Dual, DetachedDual) and not looks_into_tuples(module):
            named = kinds.as_python_constant()
            is_one = issubclass(Tensor, named) or (issubclass(kind, named) and not issubclass(tuple, named))
            return type(arg).build(tx, is_one)
        return original(self, tx, arg, kinds)

    variable.call_isinstance = call_isinstance
    variable.call_function_handler_cache.clear()


def _teach_hasattr(variable: Any) -> None:
    """hasattr(type(x), name), by which functions of torch written in Python look for `__torch_function__` when one of
    their arguments is a Dual; Dynamo of PyTorch 2.11 answers for no class that it met as the type of a value."""
    original = variable.call_obj_hasattr

    def call_obj_hasattr(self: Any, tx: Any, name: str) -> Any:
        known = self.value in (Dual, DetachedDual, torch.nn.Parameter)
        return self.build(tx, hasattr(self.value, name)) if known else original(self, tx, name)

    variable.call_obj_hasattr = call_obj_hasattr


def _teach_memory(storage: Any, tensor: Any) -> None:
    def cdata(self: Any, tx: Any) -> Any:
        return self.build(tx, self.example_value._cdata)

    def storage_offset(self: Any, tx: Any, *_: Any) -> Any:
        offset = self.as_proxy().node.meta["example_value"].storage_offset()
        return self.build(tx, offset) if isinstance(offset, int) else None  # None: as without this

    if hasattr(storage, "tp_getset"):  # tables, since PyTorch 2.14
        base: Any = sys.modules["torch._dynamo.variables.base"]
        storage.tp_getset = storage.tp_getset | {"_cdata": base.GetSet(cdata)}
        tensor.tp_methods = tensor.tp_methods | {"storage_offset": base.Method(storage_offset)}
    else:
        original = storage.var_getattr
        storage.var_getattr = lambda self, tx, name: cdata(self, tx) if name == "_cdata" else original(self, tx, name)
        tensor.method_storage_offset = storage_offset


def _teach_assignment(tensor: Any) -> None:
    """x[...] = dual, which asks no mode since PyTorch 2.14; other methods of x do."""
    original = tensor.mp_ass_subscript_impl

    def assign(self: Any, tx: Any, key: Any, value: Any) -> Any:
        if getattr(value, "tuple_cls", None) in (Dual, DetachedDual):
            return self.call_method(tx, "__setitem__", [key, value], {})
        return original(self, tx, key, value)

    tensor.mp_ass_subscript_impl = assign


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
    if torch.__version__ < "2.13":
        _trace_einops(sys.modules["einops"])


def _trace_einops(einops: Any) -> None:
    """Dynamo of PyTorch 2.11 puts the functions of einops into the graph as a whole, and a Dual with them, although it
    can trace them."""
    from torch._dynamo import trace_rules

    trace_rules._maybe_init_lazy_module(einops.rearrange)  # or it would do so later, and allow them again
    for function in (einops.rearrange, einops.reduce, einops.repeat, einops.einsum, einops.pack, einops.unpack):
        trace_rules._allowed_callable_ids.remove(id(function))


def _teach_flex_attention() -> None:
    """Its refusal would come out of a compilation of its own, without a name."""
    module: Any = sys.modules["torch.nn.attention.flex_attention"]
    original = module._validate_sdpa_input
    if original.__module__ == __name__:
        return

    def validate(*args: Any, **kwargs: Any) -> Any:
        if duals_in([*args, *kwargs.values()]):
            fix = "use F.scaled_dot_product_attention, with what score_mod adds as its attn_mask"
            raise missing_rule_error(module.flex_attention, fix)
        return original(*args, **kwargs)

    module._validate_sdpa_input = validate
