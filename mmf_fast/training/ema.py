"""The exponential moving average of the weights, from which samples are drawn."""

import torch
from torch import Tensor

__all__ = ["move_average"]


@torch.no_grad()
def move_average(average: list[Tensor], values: list[Tensor], decay: float, step: float, skip: Tensor) -> None:
    """theta_ema <- theta_ema + (1 - d_n) (theta - theta_ema),   d_n = min(decay, (1 + n) / (10 + n)) at step n,

    of lists of tensors, in place; where `skip` (0-d bool tensor) is true, nothing changes. step counts from 0.

    The warm-up of the decay (that of tf.train.ExponentialMovingAverage's `num_updates`) keeps the initial weights from
    lingering in short runs. torch.optim.swa_utils.AveragedModel averages alike, but reads a counter from the device at
    each update, which makes the host wait.
    """
    weight = torch.where(skip, 0.0, 1 - min(decay, (1 + step) / (10 + step)))
    change = torch._foreach_sub(values, average)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(average, change)
