"""mmf_fast: fast, exact training of one-step generative models of the MeanFlow family."""

from mmf_fast import rules as _rules
from mmf_fast.dual import Dual, MissingRuleError, register_rule

__all__ = ["Dual", "MissingRuleError", "register_rule"]
