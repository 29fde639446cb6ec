"""A run of a second with a network and data that are not of this package."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmf_fast import MeanFlowLoss, Optimizer, TimeSampler, Train, Trainer


class Net(nn.Module):
    """u(z, r, t, y) without any attribute of the networks of this package; the last layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(3, 4)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Dropout(0.1), nn.Linear(16, 2))
        self.last = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.last(self.body(torch.cat([z, r[:, None], t[:, None], self.label(y)], 1))) * self.scale


SETTINGS = Train(batch=8, steps=10, log_every=1, sample_every=0, checkpoint_every=4, device="cpu")
X, Y = torch.randn(24, 2, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


def trainer(run: Path, data: Any = (X, Y), steps: int = 10, wrap: Any = lambda net: net, **options: Any) -> Trainer:
    torch.manual_seed(1)
    loss_fn = MeanFlowLoss(wrap(Net()), times=TimeSampler(share=0.5), lam=0.5, paired=True, null_label=2)
    train = Train(**{**vars(SETTINGS), "steps": steps, **options.pop("settings", {})})
    options = {"optimizer": Optimizer(warmup=2, ema=0.5), **options}
    return Trainer(loss_fn, data, run, train=train, **options)
