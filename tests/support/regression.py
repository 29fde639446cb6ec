"""A loss module of a line, a network and batches for it: what an engine steps on."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmf_fast.config import Optimizer, Train
from mmf_fast.objective import BatchShare


class Output(NamedTuple):
    loss: Tensor
    metrics: dict[str, Tensor]


class Regression(nn.Module):
    """A loss module with the trainer's calling convention: mean square distance of net(x) to y."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, step: int = 0, part: BatchShare | None = None, y: Tensor | None = None) -> Output:
        error = self.net(x) - y
        mse = error.square().mean()
        return Output(mse, {"mse": mse.detach()})


OPTIMIZER = Optimizer(lr=0.02, betas=(0.9, 0.95), weight_decay=0.1, clip=0.05, warmup=3, ema=0.5)
TRAIN = Train(batch=8, steps=20, device="cpu")


def make_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(8, 4, generator=generator), "y": torch.randn(8, 2, generator=generator)}


def weights(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
