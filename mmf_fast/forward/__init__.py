"""Forward mode: dual numbers through ordinary networks, and the other ways to a Jacobian-vector product.

dual.py          the Dual, and how a function finds its rule
rules/           the rules, one file per family of functions
interception.py  what does not reach a Dual by itself: Dynamo's spellings, torch.is_tensor, einops
functional.py    `jvp`: Duals, torch.func.jvp made right, finite differences
"""

from mmf_fast.forward import rules as rules  # importing them registers them
from mmf_fast.forward.dual import DetachedDual, Dual, MissingRuleError, primal, register_rule, tangent
from mmf_fast.forward.functional import jvp
from mmf_fast.forward.rules.sdpa import attention

__all__ = ["DetachedDual", "Dual", "MissingRuleError", "attention", "jvp", "primal", "register_rule", "tangent"]
