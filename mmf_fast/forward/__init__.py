"""Forward mode: dual numbers through ordinary networks, and the other ways to a Jacobian-vector product.

dual.py          the Dual, and how a function finds its rule
rules/           the rules, one file per family of functions
interception.py  what does not reach a Dual by itself: isinstance, checkpoints, tensors that receive one
teaching.py      what Dynamo, einops and flex_attention are told of Duals
buffers.py       plain tensors that receive a Dual
missing.py       what is said of a function that has no rule
replay.py        the same random numbers and buffers again
functional.py    `jvp`: Duals, torch.func.jvp made right, finite differences
"""

import sys

from mmf_fast.forward import rules as rules  # importing them registers them
from mmf_fast.forward.dual import DetachedDual, Dual, primal, register_rule, tangent
from mmf_fast.forward.functional import jvp
from mmf_fast.forward.missing import MissingRuleError
from mmf_fast.forward.rules.sdpa import attention

__all__ = ["DetachedDual", "Dual", "MissingRuleError", "attention", "jvp", "primal", "register_rule", "tangent"]

for _name, _module in sys.modules.copy().items():
    if _name.startswith("mmf_fast."):
        vars(_module).setdefault("isinstance", isinstance)  # a pass replaces the builtin; ours keep it, which is faster
