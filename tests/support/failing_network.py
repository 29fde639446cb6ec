"""A network that fails on one rank, in its forward or its backward pass."""

import os

import torch
from torch import Tensor

from mmf_fast.models import MLP


class FailingNetwork(MLP):
    """From its call number `call` on, on that rank.  where: forward, backward."""

    def __init__(self, dim: int, where: str, rank: int = 1, call: int = 12):
        super().__init__(dim, width=16, depth=2)
        self.where, self.rank, self.left = where, rank, call

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        u = super().forward(z, r, t)
        self.left -= 1
        if self.left > 0 or int(os.environ.get("RANK", 0)) != self.rank:
            return u
        if self.where == "forward":
            self._fail()
        elif type(u) is Tensor and u.requires_grad:  # no Dual
            u.register_hook(lambda grad: self._fail())
        return u

    def _fail(self) -> None:
        raise torch.OutOfMemoryError(f"no memory left\nfor the {self.where} pass")
