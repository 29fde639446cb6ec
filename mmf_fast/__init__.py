"""mmf_fast: fast, exact training of one-step generative models of the MeanFlow family."""

from typing import TYPE_CHECKING, Any

from mmf_fast.forward import Dual, MissingRuleError, attention, jvp, register_rule
from mmf_fast.objective import Guidance, LambdaSchedule, MeanFlowLoss, TimeSampler, preset, sg_lambda

if TYPE_CHECKING:
    from mmf_fast.models.adapter import Adapter, DiffusersAdapter
    from mmf_fast.sampling import sample
    from mmf_fast.training import Optimizer, Train, Trainer

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "DiffusersAdapter",
    "Dual",
    "Guidance",
    "LambdaSchedule",
    "MeanFlowLoss",
    "MissingRuleError",
    "Optimizer",
    "TimeSampler",
    "__version__",
    "Train",
    "Trainer",
    "attention",
    "jvp",
    "preset",
    "register_rule",
    "sample",
    "sg_lambda",
]


def __getattr__(name: str) -> Any:
    """On first use: the loss alone needs neither what sampling needs nor the networks, nor the trainer."""
    if name == "sample":
        from mmf_fast.sampling import sample

        return sample
    if name in ("Adapter", "DiffusersAdapter"):
        from mmf_fast.models import adapter

        return getattr(adapter, name)
    if name in ("Optimizer", "Train", "Trainer"):
        from mmf_fast import training

        return getattr(training, name)
    raise AttributeError(f"module 'mmf_fast' has no attribute {name!r}")
