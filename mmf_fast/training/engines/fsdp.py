"""The engine of many processes by PyTorch alone: FSDP2 (fully_shard).

    torchrun --nproc-per-node 8 mmf_fast/train.py --config configs/imagenet64.yaml train.zero=fsdp

Weights, gradients, moments and averages are shared out as at ZeRO stage 3: each rank owns some rows of each parameter,
and the first one those of no dimension. They are ordinary tensors, on which the optimizer of LocalEngine steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mmf_fast.distributed import join
from mmf_fast.objective.compiled import blocks_of
from mmf_fast.training.engines.local import LocalEngine
from mmf_fast.training.fragments import Fragment, Saved
from mmf_fast.training.settings import ConfigError, Optimizer, Train, check_ranks

__all__ = ["FSDPEngine"]


class FSDPEngine(LocalEngine):
    """`Engine` on fully_shard: of each block of the network (train.blocks), and of the rest of the loss module.

    Raises ConfigError for settings that do not fit together.
    """

    gathers = True

    def __init__(self, loss_fn: nn.Module, optimizer: Optimizer, train: Train, seed: int = 0) -> None:
        device = join(train.device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        check_ranks(train, self.world_size)
        if train.compile is True:
            raise ConfigError(
                "train.compile: FSDP2 fetches weights between blocks, so compile these: train.compile=blocks"
            )
        super().__init__(loss_fn, optimizer, train, seed, device)

    def _own(self, train: Train) -> dict[str, Fragment]:
        half = torch.bfloat16 if self.autocast else None
        # Inputs stay as they are: times are float32, and autocast converts what a product takes.
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        numbers = {each for each in self.model.parameters() if each.ndim == 0}  # FSDP2 cannot share them
        for module in (*blocks_of(self.net, train.blocks), self.model):
            fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=numbers)
        self.sharded: dict[str, Any] = {n: p for n, p in self.model.named_parameters() if n in self.shapes}
        self.numbers = [each for each in self.sharded.values() if each.ndim == 0]
        owned = {}
        for name, parameter in self.sharded.items():
            shape = self.shapes[name]
            if not shape:
                if self.rank == 0:
                    owned[name] = Fragment(0, parameter)
                continue
            rows = -(-shape[0] // self.world_size)  # of each rank but the last ones, as torch.chunk cuts
            with torch.no_grad():
                shard = parameter.to_local()
            if shard.numel():
                owned[name] = Fragment(self.rank * rows * shape[1:].numel(), nn.Parameter(shard))
        return owned

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)
        super().backward(loss, last)

    def update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        if self.numbers:
            grads = torch.stack([torch.zeros_like(each) if each.grad is None else each.grad for each in self.numbers])
            dist.all_reduce(grads)
            for number, grad in zip(self.numbers, grads / self.world_size, strict=True):
                number.grad = grad
        for name, parameter in self.sharded.items():
            grad, parameter.grad = parameter.grad, None
            if name in self.owned:
                self.owned[name].value.grad = grad.to_local() if isinstance(grad, DTensor) else grad
        result = super().update(loss)
        self._spread_numbers()
        return result

    def write(self, saved: Saved) -> None:
        super().write(saved)
        self._spread_numbers()

    @torch.no_grad()
    def _spread_numbers(self) -> None:
        """From the first rank, which owns them."""
        if self.numbers:
            values = torch.stack(self.numbers)
            dist.broadcast(values, src=0)
            for number, value in zip(self.numbers, values, strict=True):
                number.copy_(value)
