"""A run of a second, what it logged, and what spoils or stops it."""

import copy
import math
import signal
from pathlib import Path
from typing import Any

from torch import Tensor

from mmf_fast import config
from mmf_fast.config import Config
from mmf_fast.training import Trainer
from mmf_fast.training.record import read

TINY = {
    "data": {"name": "two_moons"},
    "model": {"name": "mlp", "width": 8, "depth": 1},
    "loss": {"objective": "mmf", "lam": {"kind": "linear", "warmup": 10}},
    "optimizer": {"lr": 1e-2, "warmup": 2},
    "train": {"steps": 12, "batch": 16, "log_every": 1, "sample_every": 0, "checkpoint_every": 4, "device": "cpu"},
}


def tiny(**sections: Any) -> Config:
    tree = copy.deepcopy(TINY)
    for name, values in sections.items():
        if isinstance(values, dict):
            tree.setdefault(name, {}).update(values)
        else:
            tree[name] = values
    return config.from_tree(tree)


def records(run: Path) -> list[dict[str, Any]]:
    """What was logged, without what depends on the clock and the memory of the process."""
    measured = ("_second", "_seconds", "_gib")
    return [{k: v for k, v in record.items() if not k.endswith(measured)} for record in read(run / "metrics.jsonl")]


class Poisoned:
    """A dataset whose batches hold a NaN at the given steps."""

    def __init__(self, dataset: Any, steps: range) -> None:
        self.dataset, self.steps = dataset, steps
        self.shape, self.num_classes, self.name = dataset.shape, dataset.num_classes, dataset.name

    def batch(self, step: int, size: int, *ranks: int) -> tuple[Tensor, Tensor | None]:
        x, y = self.dataset.batch(step, size, *ranks)
        return (x * math.nan if step in self.steps else x), y


def stopping_at(trainer: Trainer, *stops: int) -> None:
    """A signal comes in each of these steps."""
    real = trainer.engine.step

    def engine_step(x: Tensor, step: int, **cond: Tensor) -> Any:
        if step in stops:
            signal.raise_signal(signal.SIGINT)
        return real(x, step, **cond)

    trainer.engine.step = engine_step  # type: ignore[method-assign]
