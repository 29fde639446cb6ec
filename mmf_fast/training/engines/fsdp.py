"""The engine of many processes by PyTorch alone: FSDP2 (fully_shard).

    torchrun --nproc-per-node 8 mmf_fast/train.py --config configs/imagenet64.yaml train.zero=fsdp

Weights, gradients, moments and averages are shared out as at ZeRO stage 3: each rank owns some rows of each parameter.
They are ordinary tensors, on which the optimizer of LocalEngine steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mmf_fast.distributed import join
from mmf_fast.training.engines.base import blocks_of
from mmf_fast.training.engines.local import LocalEngine
from mmf_fast.training.fragments import Fragment
from mmf_fast.training.optimizers import clip_or_skip
from mmf_fast.training.settings import ConfigError, Optimizer, Train, check_ranks

__all__ = ["FSDPEngine"]


class FSDPEngine(LocalEngine):
    """`Engine` on fully_shard: of each block of the network (train.blocks), and of the rest of the loss module.

    Raises ConfigError for settings that do not fit together.
    """

    def __init__(self, loss_fn: nn.Module, optimizer: Optimizer, train: Train, seed: int = 0) -> None:
        device = join(train.device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        check_ranks(train, self.world_size)
        if train.compile is True:
            raise ConfigError(
                "train.compile: FSDP2 fetches weights between blocks, so compile these: train.compile=blocks"
            )
        for name, parameter in loss_fn.named_parameters():
            if parameter.ndim == 0:
                raise ConfigError(
                    f"train.zero=fsdp: {name} is a single number, which FSDP2 cannot share: give it 1 row"
                )
        super().__init__(loss_fn, optimizer, train, seed, device)

    def _own(self, train: Train) -> dict[str, Fragment]:
        half = torch.bfloat16 if self.autocast else None
        # Inputs stay as they are: times are float32, and autocast converts what a product takes.
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for block in blocks_of(self.net, train.blocks):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)
        self.sharded: dict[str, Any] = {n: p for n, p in self.model.named_parameters() if n in self.shapes}
        owned = {}
        for name, parameter in self.sharded.items():
            shape = self.shapes[name]
            rows = -(-shape[0] // self.world_size)  # of each rank but the last ones, as torch.chunk cuts
            with torch.no_grad():
                shard = parameter.to_local()
            if shard.numel():
                owned[name] = Fragment(self.rank * rows * shape[1:].numel(), nn.Parameter(shard))
        return owned

    def averaged(self) -> nn.Module:
        return super(LocalEngine, self).averaged()

    def start_average(self) -> None:
        super(LocalEngine, self).start_average()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)
        super().backward(loss, last)

    def update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        for name, fragment in self.owned.items():
            grad = self.sharded[name].grad
            fragment.value.grad = None if grad is None else grad.to_local()
            self.sharded[name].grad = None
        norm, bad = clip_or_skip(
            [each.value for each in self.owned.values()], self.optimizer, self.config.clip, loss, shared=True
        )
        self.optimizer.step()
        return norm, bad
