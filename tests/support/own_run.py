"""A training of one's own under one process or several: torchrun ... own_run.py FOLDER STEPS ZERO [COMPILE].

The loss module has a parameter of its own, its network a frozen part and a buffer that each call changes.
"""

import os
import sys
import warnings

import torch
from torch import Tensor, nn

from mmf_fast import MeanFlowLoss, Optimizer, TimeSampler, Train, Trainer
from mmf_fast.objective import LossOutput


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6)) for _ in range(2))
        self.first, self.last = nn.Linear(4, 6).requires_grad_(False), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        h = self.first(torch.cat([z, r[:, None], t[:, None]], 1))
        for block in self.blocks:
            h = h + block(h)
        return self.last(h) * (1 + 0.01 * self.calls)


class Loss(MeanFlowLoss):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, times=TimeSampler(share=0.5), lam=0.5, paired=True, p=0.5)
        self.scale = nn.Parameter(torch.full((3,), 0.1))

    def forward(self, x: Tensor, **options: object) -> LossOutput:  # type: ignore[override]
        out = super().forward(x, **options)  # type: ignore[arg-type]
        loss = (-self.scale).exp().mean() * out.loss + self.scale.mean()
        return out._replace(loss=loss)


def main(folder: str, steps: str, zero: str, compile: str = "") -> None:
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # the first rank's weights count
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    train = Train(
        batch=16, steps=int(steps), zero=zero, log_every=1, checkpoint_every=4, device="cpu", compile=compile or False
    )
    optimizer = Optimizer(lr=0.01, warmup=2, ema=0.8, eps=1e-4, weight_decay=0.1)
    Trainer(Loss(Net()), x, folder, train=train, optimizer=optimizer, resume=True).fit()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(*sys.argv[1:])
