"""Forward mode: dual numbers through ordinary networks, and the other ways to a Jacobian-vector product.

dual.py        the Dual, `jvp`, and how a function finds its rule
rules/         the rules, one file per family of functions
functional.py  torch.func.jvp made right, finite differences
"""

from mmf_fast.forward import rules as rules  # importing them registers them
from mmf_fast.forward.dual import DetachedDual, Dual, MissingRuleError, jvp, primal, register_rule, tangent
from mmf_fast.forward.rules.sdpa import attention

__all__ = ["DetachedDual", "Dual", "MissingRuleError", "attention", "jvp", "primal", "register_rule", "tangent"]
