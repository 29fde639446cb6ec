"""What is said of an operation that met a Dual and has no rule: its name, the module it ran in, and the way out."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.overrides import resolve_name

__all__ = ["MissingRuleError", "missing_rule_error"]

_RULE_OF_PYTORCH = """@mmf_fast.register_rule({name})  # right if PyTorch's derivative is: look at it with mmf doctor
def rule(x, *args, **kwargs):
    return torch.func.jvp(lambda x: {name}(x, *args, **kwargs), (x.primal,), (x.tangent,))"""
_OWN_RULE = """@mmf_fast.register_rule({name})
def rule(x, *args, **kwargs):
    return {call}(x.primal, *args, **kwargs), ...  # and its derivative along x.tangent"""
_OF_AUTOGRAD = ("requires_grad_", "retain_grad", "backward")
_NUMBERS = ("item", "tolist", "numpy", "data", "__array__", "__float__", "__int__")


class MissingRuleError(NotImplementedError, AttributeError):
    """An operation met a Dual and no rule says what its tangent is.

    function: the operation, where a rule is all that it lacks; `rule` is then what to write.
    """

    function: Any = None

    @property
    def rule(self) -> str:
        """The lines that would serve the operation, if PyTorch's own derivative is right; '' if there are none."""
        name = resolve_name(self.function) if self.function is not None else None
        if isinstance(self.function, type):  # an autograd.Function
            return _OWN_RULE.format(name=self.function.__name__, call=f"{self.function.__name__}.apply")
        if name is None or isinstance(self.function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return _OWN_RULE.format(name=name, call=name) if name else ""
        return _RULE_OF_PYTORCH.format(name=name)

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.rule}" if self.rule else super().__str__()


def missing_rule_error(func: Any, fix: str | None = None) -> MissingRuleError:
    """The error of an operation that has no rule, in one line: the operation, the module it ran in, the way out."""
    name = getattr(func, "__name__", str(func))
    in_place = name == "__setitem__" or (name[-1:] == "_" and name[-2:] != "__")
    if fix is None and name in _NUMBERS:
        fix = f"what it gives has no tangent, write x.detach().{name} where it is meant as a constant"
    if fix is None and name in _OF_AUTOGRAD:
        fix = 'a network that calls autograd itself runs with jvp="finite_difference" alone'
    if fix is None and in_place:
        fix = "it cannot write into a Dual, use the out-of-place form"
    error = MissingRuleError(
        f"no forward-mode rule for {name}{_module_path()}: "
        + (fix or 'teach it with mmf_fast.register_rule, or try jvp="func", else "finite_difference", for the network')
    )
    error.function = None if fix else func
    return error


def _module_path() -> str:
    """' in blocks.0.attn (Attention)' for the innermost nn.Module on the Python stack."""
    if torch.compiler.is_compiling():
        return ""
    frame, modules = sys._getframe(), list[nn.Module]()
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and (not modules or modules[-1] is not module):
            modules.append(module)
        frame = frame.f_back  # type: ignore[assignment]
    if not modules:
        return ""
    inner, outer = modules[0], modules[-1]
    path = next((name for name, module in outer.named_modules() if module is inner), "")
    return f" in {path} ({type(inner).__name__})" if path else f" in {type(inner).__name__}"
