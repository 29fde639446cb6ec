"""A network and a dataset of one's own in the trainer: moving average, resuming, pictures, logs, ZeRO or FSDP2.

    python examples/own_trainer.py --run runs/own                        one process
    torchrun --nproc-per-node 2 examples/own_trainer.py --run runs/own --zero zero1.json      or deepspeed

Killed and started again, it goes on where it was.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmf_fast import LambdaSchedule, MeanFlowLoss, Optimizer, Train, Trainer


class Spiral(Dataset):
    """Points of the plane, computed when they are asked for."""

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, i: int) -> Tensor:
        generator = torch.Generator().manual_seed(i)
        turn, blur = 9 * torch.rand((), generator=generator).sqrt(), 0.05 * torch.randn(2, generator=generator)
        return turn / 6 * torch.stack([turn.cos(), turn.sin()]) + blur


class Network(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Linear(4, width), nn.SiLU()), *(nn.Linear(width, width), nn.SiLU()) * 2, nn.Linear(width, 2)
        )

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return self.body(torch.cat([z, t[:, None], (t - r)[:, None]], dim=1))


class ErrorsAsJson:
    """A logger of one's own: it is called with what the trainer logs, on the first process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, step: int, row: dict[str, float]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "error": row["mse"]}) + "\n")


def main(run: Path, steps: int, zero: str) -> None:
    torch.manual_seed(0)
    loss_fn = MeanFlowLoss(Network(), lam=LambdaSchedule(kind="linear", warmup=500), paired=True, p=0.0)
    trainer = Trainer(
        loss_fn,
        Spiral(),
        run,
        train=Train(batch=256, steps=steps, zero=zero, log_every=50),
        optimizer=Optimizer(lr=1e-3, ema=0.995),
        callbacks=[ErrorsAsJson(run / "errors.jsonl")],
        resume=True,
    )
    trainer.fit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/own"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--zero", default="", help="a DeepSpeed file such as zero1.json; default: none")
    options, _ = parser.parse_known_args()  # launchers add --local_rank
    main(options.run, options.steps, options.zero)
