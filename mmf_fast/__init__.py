"""mmf_fast: fast, exact training of one-step generative models of the MeanFlow family."""

from mmf_fast import rules as rules  # importing them registers them
from mmf_fast.dual import Dual, MissingRuleError, jvp, register_rule
from mmf_fast.objective import Guidance, LambdaSchedule, MeanFlowLoss, TimeSampler, preset, sg_lambda

__all__ = [
    "Dual",
    "Guidance",
    "LambdaSchedule",
    "MeanFlowLoss",
    "MissingRuleError",
    "TimeSampler",
    "jvp",
    "preset",
    "register_rule",
    "sg_lambda",
]
