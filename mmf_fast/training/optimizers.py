"""The optimizers a configuration may name."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mmf_fast.config import ConfigError, Optimizer

__all__ = ["build_optimizer"]


def build_optimizer(parameters: Iterable[nn.Parameter], config: Optimizer) -> torch.optim.Optimizer:
    """AdamW of `config.kind`. Raises ConfigError, naming what to install, for a kind that is not here."""
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **common)
    try:
        from apex.optimizers import FusedAdam  # NVIDIA's; the "apex" of PyPI is another project
    except ImportError as error:
        raise ConfigError(
            "optimizer.kind=apex needs NVIDIA Apex, built from github.com/NVIDIA/apex (the PyPI package apex is "
            "another project); or take optimizer.kind=adamw"
        ) from error
    return FusedAdam(parameters, adam_w_mode=True, **common)
