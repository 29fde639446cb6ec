"""The exponential moving average of the weights, from which samples are drawn."""

import copy
from typing import cast

import torch
from torch import Tensor, nn


class EMA:
    """theta_ema <- theta_ema + (1 - d_n) (theta - theta_ema),   d_n = min(decay, (1 + n) / (10 + n)) at step n.

    The warm-up of the decay (that of tf.train.ExponentialMovingAverage's `num_updates`) keeps the initial weights from
    lingering in short runs. torch.optim.swa_utils.AveragedModel averages alike, but reads a counter from the device at
    each update, which makes the host wait.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.net = copy.deepcopy(net).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module, step: int, skip: Tensor) -> None:
        """One update towards `net`; step counts from 0. Where `skip` (0-d bool tensor) is true, nothing changes."""
        average = cast(list[Tensor], list(self.net.parameters()))
        move_average(average, cast(list[Tensor], list(net.parameters())), self.decay, step, skip)
        for buffer, source in zip(self.net.buffers(), net.buffers(), strict=True):
            buffer.copy_(source)


@torch.no_grad()
def move_average(average: list[Tensor], values: list[Tensor], decay: float, step: int, skip: Tensor) -> None:
    """The update of `EMA` on lists of tensors, in place; where `skip` (0-d bool tensor) is true, nothing changes."""
    weight = torch.where(skip, 0.0, 1 - min(decay, (1 + step) / (10 + step)))
    change = torch._foreach_sub(values, average)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(average, change)
