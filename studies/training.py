"""The loop of the studies: an engine of mmf_fast, fed step by step, without a run folder."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from mmf_fast import MeanFlowLoss, Optimizer, Train
from mmf_fast.data import Dataset, conditions_of
from mmf_fast.training.engines import Engine, StepResult, build_engine

__all__ = ["relative_cost", "sgd_engine", "train"]


def sgd_engine(loss_fn: nn.Module, optimizer: Optimizer, train: Train, seed: int = 0) -> Engine:
    """Stochastic gradient descent with momentum 0.9 in place of AdamW, at the learning rate of the settings."""

    def sgd(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([each for _, each in named], lr=optimizer.lr, momentum=0.9, fused=True)

    return build_engine(loss_fn, optimizer, train, seed, sgd)


def train(
    loss_fn: MeanFlowLoss,
    data: Dataset,
    *,
    steps: int,
    batch: int,
    seed: int,
    optimizer: Optimizer,
    make_engine: Callable[..., Engine] = build_engine,
    watch: Callable[[int, StepResult], None] | None = None,
    compiled: bool | None = None,
) -> nn.Module:
    """Trains the network of the loss and returns it with averaged weights, on the CPU, in evaluation mode.

    compiled: by default long runs are; those of one process share their graphs.

    watch: is called as watch(step, result) after every step.
    """
    if steps >= 500 if compiled is None else compiled:
        loss_fn.compile()
    engine = make_engine(loss_fn, optimizer, Train(steps=steps, batch=batch), seed)
    for step in range(steps):
        x, y = data.batch(step, batch)
        result = engine.step(x, step, **conditions_of(y))
        if watch:
            watch(step, result)
    return engine.averaged().cpu()


def relative_cost(engine: Engine, other: Engine, data: Dataset, batch: int, rounds: int) -> float:
    """Time of a step of one engine over that of another: the median ratio of steps in turn, so that whatever else the
    computer does, and however fast it is, changes nothing."""

    def took(engine: Engine, step: int) -> float:
        x, y = data.batch(step, batch)
        start = time.process_time()
        engine.step(x, step, **conditions_of(y))
        return time.process_time() - start

    return statistics.median(took(engine, step) / took(other, step) for step in range(rounds))
