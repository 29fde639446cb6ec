"""The engines: what makes one optimisation step, and keeps weights, averages and the optimizer's state.

An engine owns the loss module, the optimizer and the device; the trainer owns time (steps, data, records, checkpoints).
"""

import os

from torch import nn

from mmf_fast.training.engines.base import Engine, StepResult
from mmf_fast.training.optimizers import MakeOptimizer
from mmf_fast.training.settings import ConfigError, Optimizer, Train, read_zero

__all__ = ["Engine", "StepResult", "build_engine"]


def build_engine(
    loss_fn: nn.Module, optimizer: Optimizer, train: Train, seed: int = 0, make_optimizer: MakeOptimizer | None = None
) -> Engine:
    """The engine that trains the loss, by train.zero. Raises ConfigError where it cannot be had."""
    if train.zero and make_optimizer:
        raise ConfigError(
            f"train.zero={train.zero} shares parameters out, and make_optimizer would get pieces of them: train in one "
            "process, or in a loop of your own (examples/ddp.py)"
        )
    if train.zero == "fsdp":
        from mmf_fast.training.engines.fsdp import FSDPEngine

        return FSDPEngine(loss_fn, optimizer, train, seed)
    if train.zero:
        try:
            from mmf_fast.training.engines.deepspeed import DeepSpeedEngine
        except ImportError as error:
            raise ConfigError("train.zero needs DeepSpeed: pip install --no-build-isolation deepspeed") from error
        return DeepSpeedEngine(loss_fn, optimizer, train, read_zero(train.zero), seed)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("several processes were started: set train.zero, for instance train.zero=zero1.json or fsdp")
    from mmf_fast.training.engines.local import LocalEngine

    return LocalEngine(loss_fn, optimizer, train, seed, make_optimizer=make_optimizer)
