"""What the trainer asks of an engine: one optimisation step, the averaged weights, and its state.

An engine owns the loss module, the optimizer and the device; the trainer owns time (steps, data, records, checkpoints).
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmf_fast.training.timing import Phases


class StepResult(NamedTuple):
    """What one step gave. Reading a tensor waits for the device, so the trainer does it only where it logs.

    metrics: detached 0-d tensors, at least "loss" (before the step), "grad_norm" (before clipping) and "lr".
    skipped: 0-d bool tensor: the loss or its gradient was not finite, and nothing was changed.
    """

    metrics: dict[str, Tensor]
    skipped: Tensor


class Engine(Protocol):
    """One process' share of the training. Every rank calls every method, in the same order."""

    rank: int
    world_size: int
    device: torch.device
    phases: Phases  # of which `step` times its share: "data" (to the device), "loss", "backward", "optimizer"

    def step(self, x: Tensor, step: int, **cond: Tensor) -> StepResult:
        """One update on this rank's samples x (B, *shape), rows rank, rank + world_size, ... of the global batch, with
        their rows of cond; `step` counts from 0 and sets learning rate, lambda, noise and times."""
        ...

    def averaged(self) -> nn.Module:
        """The network with its averaged weights, in eval mode, whole on rank 0."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """This rank's share of weights, average and optimizer, as tensors and plain containers only: it must load with
        weights_only=True."""
        ...

    def load_state_dict(self, shares: list[dict[str, Any]]) -> None:
        """Takes what all ranks returned from state_dict, in their order."""
        ...
