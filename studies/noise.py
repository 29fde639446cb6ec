"""How noisy the gradient of a loss is at the present weights of its network."""

from __future__ import annotations

import math

import torch

from mmf_fast import MeanFlowLoss
from mmf_fast.data import Dataset

__all__ = ["signal_to_noise"]


def signal_to_noise(loss_fn: MeanFlowLoss, data: Dataset, batch: int, batches: int = 24) -> float:
    """|E g| / sqrt(E |g - E g|^2) of the gradient g of one batch: 1 where a step is as much signal as noise.

    Of independent batches; the noise that is left in their mean is taken off |E g|^2, so it may come out as zero.
    """
    parameters = [each for each in loss_fn.parameters() if each.requires_grad]
    total, squares = torch.zeros(sum(each.numel() for each in parameters)), 0.0
    for number in range(batches):
        x, y = data.batch(10**6 + number, batch)  # batches that no training step has
        loss = loss_fn(x, **({} if y is None else {"y": y})).loss
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                          for p, g in zip(parameters, found, strict=True)])  # fmt: skip
        total += flat
        squares += float(flat.square().sum())
    mean = float((total / batches).square().sum())
    variance = (squares / batches - mean) * batches / (batches - 1)
    return math.sqrt(max(0.0, mean - variance / batches) / max(variance, 1e-30))
