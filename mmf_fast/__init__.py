"""mmf_fast: fast, exact training of one-step generative models of the MeanFlow family."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmf_fast.forward import Dual, MissingRuleError, attention, jvp, register_rule
from mmf_fast.objective import Guidance, LambdaSchedule, MeanFlowLoss, TimeSampler, preset, sg_lambda

if TYPE_CHECKING:
    from mmf_fast.models import load_pretrained
    from mmf_fast.models.adapter import Adapter, DiffusersAdapter
    from mmf_fast.sampling import sample
    from mmf_fast.training import Optimizer, Train, Trainer

__version__ = "0.1.0"

# Taken on first use: the loss alone needs neither what sampling needs nor the networks, nor the trainer.
_LATER = {
    "Adapter": "models.adapter",
    "DiffusersAdapter": "models.adapter",
    "Optimizer": "training",
    "Train": "training",
    "Trainer": "training",
    "load_pretrained": "models",
    "sample": "sampling",
}

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
    "load_pretrained",
    "preset",
    "register_rule",
    "sample",
    "sg_lambda",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'mmf_fast' has no attribute {name!r}")
    return getattr(import_module(f"mmf_fast.{_LATER[name]}"), name)
