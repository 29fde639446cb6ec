"""A run of a second, and data that spoil it."""

import copy
import math
from typing import Any

from torch import Tensor

from mmf_fast import config
from mmf_fast.config import Config

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


class Poisoned:
    """A dataset whose batches hold a NaN at the given steps."""

    def __init__(self, dataset: Any, steps: range) -> None:
        self.dataset, self.steps = dataset, steps
        self.shape, self.num_classes, self.name = dataset.shape, dataset.num_classes, dataset.name

    def batch(self, step: int, size: int, *ranks: int) -> tuple[Tensor, Tensor | None]:
        x, y = self.dataset.batch(step, size, *ranks)
        return (x * math.nan if step in self.steps else x), y
