"""A network and a loop of one's own: labels, guidance inside the target, a moving average, samples in one evaluation.

python examples/own_network.py --steps 2000          two minutes on two cores; writes own_network.png
"""

import argparse

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmf_fast import Adapter, Guidance, LambdaSchedule, MeanFlowLoss, sample
from mmf_fast.data import load
from mmf_fast.pictures import save_grid


class TheirNetwork(nn.Module):
    """Somebody's network of 8x8 images. It is called net(z, t, h, y), where h is the length t - r of the interval."""

    num_classes = 10  # label 10 means no class

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.times = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(self.num_classes + 1, width)
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(4)
        )
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, z: Tensor, t: Tensor, h: Tensor, y: Tensor) -> Tensor:
        c = (self.times(torch.stack([t, h], dim=1)) + self.labels(y))[:, :, None, None]
        x = self.first(z)
        for block in self.blocks:
            x = x + block(x + c)
        return self.last(x)


def main(steps: int) -> None:
    torch.manual_seed(0)
    net = Adapter(TheirNetwork(), lambda net, z, r, t, y: net(z, t, t - r, y))
    curriculum = LambdaSchedule(kind="linear", value=0.1, warmup=max(1, steps // 2))
    loss_fn = MeanFlowLoss(net, lam=curriculum, paired=True, guidance=Guidance(omega=2.0))
    optimizer = torch.optim.AdamW(loss_fn.parameters(), lr=1e-3)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.995))

    digits = load("digits")
    for step in range(steps):
        x, y = digits.batch(step, size=128)
        out = loss_fn(x, step=step, y=y)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(net)
        if step % 100 == 0:
            print(f"step {step}: error {out.metrics['mse']:.4f}, lambda {out.metrics['lam']:.2f}")

    labels = torch.arange(80) % 10
    save_grid(sample(average.module, (80, 1, 8, 8), steps=1, seed=0, y=labels), "own_network.png", columns=10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    main(parser.parse_args().steps)
