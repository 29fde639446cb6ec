"""The loss in a loop of one's own under DistributedDataParallel, which wraps the loss as it wraps any module.

torchrun --nproc-per-node 2 examples/ddp.py --steps 500
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmf_fast import MeanFlowLoss, sample
from mmf_fast.data import load
from mmf_fast.models import MLP
from mmf_fast.objective import BatchShare


def main(steps: int) -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    torch.manual_seed(0)

    net = MLP(dim=2).to(device)
    loss_fn = DistributedDataParallel(MeanFlowLoss(net, lam=1.0, paired=True))
    optimizer = torch.optim.AdamW(loss_fn.parameters(), lr=1e-3)
    moons = load("two_moons")
    for step in range(steps):
        x, _ = moons.batch(step, 256, rank, ranks)
        # Noise and times are a function of (seed, step, row): the step is the same on any number of processes.
        out = loss_fn(x.to(device), step=step, part=BatchShare(rank, ranks, seed=0))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 100 == 0:
            print(f"step {step}: error {out.metrics['mse']:.4f}")
    if rank == 0:
        print("one-step samples:", sample(net, (4, 2), seed=1).tolist())
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    main(parser.parse_args().steps)
