"""The AdamW that a configuration may name; DeepSpeed's own are built in its engine."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mmf_fast.config import ConfigError, Optimizer

__all__ = ["adam_options", "build_optimizer"]


def adam_options(config: Optimizer) -> dict[str, Any]:
    """What all kinds take, under the same names."""
    return {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}


def build_optimizer(parameters: Iterable[nn.Parameter], config: Optimizer) -> torch.optim.Optimizer:
    """PyTorch's AdamW or Apex's, by `config.kind`. Raises ConfigError, naming what to install, if it is not here."""
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **adam_options(config))
    try:
        from apex.optimizers import FusedAdam  # NVIDIA's; the "apex" of PyPI is another project
    except ImportError as error:
        raise ConfigError(
            "optimizer.kind=apex needs NVIDIA Apex, built from github.com/NVIDIA/apex (the PyPI package apex is "
            "another project); or take optimizer.kind=adamw"
        ) from error
    return FusedAdam(parameters, adam_w_mode=True, **adam_options(config))
