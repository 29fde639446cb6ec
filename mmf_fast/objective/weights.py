"""The weight of a row by its times alone: 1 / (m(r, t) + c)^p, with m a running mean of ||e||^2.

MeanFlow's weight 1 / (||e||^2 + c)^p depends on the row's own noise, so that the minimiser of the loss is not E[v | z].
A weight that is a function of (r, t) and of earlier steps leaves the mean of the gradient zero where e has zero mean,
and makes the scales of all times equal too, as the learned variance of EDM2 does (arXiv 2312.02696).

    bin    (floor(8 t), floor(8 (t - r) / t))
    S, N   of each bin: sums over its rows of ||e||^2 / D and of 1, which decay at each step
    g      (1 + sum S) / (1 + sum N), the mean over all bins; 1 before the first step
    m      D (S + PRIOR g) / (N + PRIOR): a bin with few rows is near g
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmf_fast.objective.draws import BatchShare, Draw

__all__ = ["TimesWeight"]

BINS = 8  # of each axis
DECAY = 0.99  # of the sums, at each step: a mean remembers about a hundred
PRIOR = 8.0  # rows


class TimesWeight(nn.Module):
    """The weights of a draw, weight = self(draw), and, once its errors are known, self.add(draw, square, part).

    A step's rows count from the next step on, in whatever parts and on whatever ranks they came: where there are
    several ranks, each must call it equally often. `sums` is saved with the loss module.
    """

    sums: Tensor  # (2, BINS^2): S and N

    def __init__(self, p: float, c: float) -> None:
        super().__init__()
        self.p, self.c = p, c
        self.register_buffer("sums", torch.zeros(2, BINS**2))
        self.pending: Tensor | None = None  # of the parts of this step so far; no buffer, as DDP makes those alike

    def forward(self, draw: Draw) -> Tensor:
        """(B,), in the order of the draw."""
        if self.sums.device != draw.t.device:  # the network alone was moved
            self.sums.data = self.sums.to(draw.t.device)
        square, count = self.sums
        mean = (1 + square.sum()) / (1 + count.sum())
        of_bin = (_elements(draw) * (square + PRIOR * mean) / (count + PRIOR) + self.c) ** -self.p
        return of_bin[_bins(draw)].to(draw.t.dtype)

    @torch.no_grad()
    def add(self, draw: Draw, square: Tensor, part: BatchShare) -> None:
        """square: ||e||^2 of the rows that count, of this part of the global batch. What is not finite is left out."""
        finite = square.isfinite()
        rows = torch.stack([torch.where(finite, square / _elements(draw), 0.0), finite]).to(self.sums.dtype)
        self.pending = torch.zeros_like(self.sums) if self.pending is None else self.pending
        self.pending.index_add_(1, draw.counted(_bins(draw)), rows)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if (part.index + 1) % max(1, part.count // ranks) == 0:  # the last of this rank's parts
            if ranks > 1:
                dist.all_reduce(self.pending)
            self.sums.mul_(DECAY).add_(self.pending)
            self.pending = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """To another device, but not to another precision: in bfloat16 a sum of 256 stays as it is when 1 is added.
        The tensor stays the same object, which an engine holds."""
        sums, dtype = self.sums, self.sums.dtype
        super()._apply(fn, recurse)
        sums.data = self.sums.to(dtype)
        self.sums = sums
        return self


def _elements(draw: Draw) -> int:
    return math.prod(draw.x.shape[1:])


def _bins(draw: Draw) -> Tensor:
    """(B,) int64."""
    share = (draw.t - draw.r) / draw.t.clamp_min(torch.finfo(draw.t.dtype).tiny)
    row, column = ((BINS * each).long().clamp_(max=BINS - 1) for each in (draw.t, share))
    return BINS * row + column
