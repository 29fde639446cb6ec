"""One rank of test_parallel.py: the loss module in PyTorch's own wrappers, and the gradients they leave.

torchrun --nproc-per-node 2 parallel_ranks.py '{"case": {"wrapper": "ddp", "lam": 1.0, ...}, ...}' FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from support.engine_cases import data, loss_function
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mmf_fast.distributed import join
from mmf_fast.objective import BatchShare, MeanFlowLoss

SEED, STEPS, RATE = 3, 2, 0.1


def wrapped(loss_fn: MeanFlowLoss, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(loss_fn)
    for block in loss_fn.net.blocks:  # type: ignore[attr-defined]
        fully_shard(block)
    return fully_shard(loss_fn)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def steps(loss_fn: nn.Module, net: nn.Module, part: BatchShare) -> list[dict]:
    """Loss and gradients by name of a few steps of gradient descent, on this part of the batch."""
    x, y = data()
    x, y = part.of(x.to(torch.get_default_dtype())), part.of(y)
    found = []
    for step in range(STEPS):
        loss = loss_fn(x, step=step, part=part, y=y).loss
        loss.backward()
        gradients = {name: whole(p.grad) for name, p in net.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), "gradients": gradients})
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
                parameter.grad = None
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    join("cpu")  # which lets gloo's threads end before the interpreter
    for name, case in json.loads(sys.argv[1]).items():
        loss_fn = loss_function(case)
        found = steps(
            wrapped(loss_fn, case["wrapper"]), loss_fn.net, BatchShare(dist.get_rank(), dist.get_world_size(), SEED)
        )
        for each in found:
            dist.all_reduce(each["loss"])
            each["loss"] /= dist.get_world_size()
        sharded = [type(p).__name__ for p in loss_fn.net.parameters()]
        if dist.get_rank() == 0:
            torch.save({"steps": found, "kinds": sorted(set(sharded))}, Path(sys.argv[2]) / f"{name}.pt")
    dist.destroy_process_group()
