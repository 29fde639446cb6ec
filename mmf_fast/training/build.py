"""From a configuration to the loss module and the engine that trains it."""

import inspect
import os
from typing import Any

from mmf_fast import data, models
from mmf_fast.config import Config, ConfigError, read_zero
from mmf_fast.objective import MeanFlowLoss
from mmf_fast.training.engines import Engine
from mmf_fast.training.engines.local import LocalEngine

__all__ = ["build_engine", "build_loss"]


def build_loss(config: Config, dataset: data.Dataset) -> MeanFlowLoss:
    """Network and loss of a configuration; shape and class count come from the data where the model has none.

    Raises ConfigError where the model's contradict the data.
    """
    shape = dataset.shape
    implied: dict[str, Any] = {"num_classes": dataset.num_classes}
    implied |= {"dim": shape[0]} if len(shape) == 1 else {"channels": shape[0], "input_size": shape[-1]}
    name = config.model["name"]
    accepted = inspect.signature(models.NETWORKS[name]).parameters
    if not implied.keys() - {"num_classes"} <= accepted.keys():
        raise ConfigError(
            f"model.name={name} does not take samples of shape {shape} (data.name={dataset.name}); choose another model"
        )
    for key in implied.keys() & config.model.keys():
        if config.model[key] != implied[key]:
            raise ConfigError(
                f"model.{key} is {config.model[key]}, but that of data.name={dataset.name} is {implied[key]}; "
                f"leave model.{key} out"
            )
    net = models.build(**{key: value for key, value in implied.items() if key in accepted} | config.model)
    loss = {key: value for key, value in config.loss.items() if key != "objective"}
    return MeanFlowLoss(net, **loss)


def build_engine(config: Config, loss_fn: MeanFlowLoss) -> Engine:
    """The engine that trains the loss, by train.zero. Raises ConfigError where it cannot be had."""
    if config.train.zero:
        try:
            from mmf_fast.training.engines.deepspeed import DeepSpeedEngine
        except ImportError as error:
            raise ConfigError("train.zero needs DeepSpeed: pip install --no-build-isolation deepspeed") from error
        return DeepSpeedEngine(loss_fn, config.optimizer, config.train, read_zero(config.train.zero), config.seed)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("several processes were started: set train.zero, for instance train.zero=zero1.json")
    return LocalEngine(loss_fn, config.optimizer, config.train, config.seed)
