"""mmf_fast: fast, exact training of one-step generative models of the MeanFlow family."""

from typing import TYPE_CHECKING, Any

from mmf_fast import rules as rules  # importing them registers them
from mmf_fast.dual import Dual, MissingRuleError, jvp, register_rule
from mmf_fast.objective import Guidance, LambdaSchedule, MeanFlowLoss, TimeSampler, preset, sg_lambda
from mmf_fast.rules.attention import attention

if TYPE_CHECKING:
    from mmf_fast.sampling import sample

__all__ = [
    "Dual",
    "Guidance",
    "LambdaSchedule",
    "MeanFlowLoss",
    "MissingRuleError",
    "TimeSampler",
    "attention",
    "jvp",
    "preset",
    "register_rule",
    "sample",
    "sg_lambda",
]


def __getattr__(name: str) -> Any:
    if name == "sample":  # on first use, so that `python -m mmf_fast.sampling` runs the module once
        from mmf_fast.sampling import sample

        return sample
    raise AttributeError(f"module 'mmf_fast' has no attribute {name!r}")
