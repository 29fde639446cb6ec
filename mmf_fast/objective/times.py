"""Draws of (r, t): which average velocities a step trains. t = 1 is noise, t = 0 is data, 0 <= r <= t <= 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmf_fast.objective.streams import GlobalStream, NumberedStream

__all__ = ["TimeSampler"]

_T_LAWS = ("uniform", "logit_normal")
_R_LAWS = ("uniform", "sorted", "logit_normal", "zero")


@dataclass(frozen=True, kw_only=True)
class TimeSampler:
    """The law of (r, t). The number of rows with r < t is a count, not a chance, so that shapes are static.

    share: the share of rows with r < t, in [0, 1]. MeanFlow (arXiv 2505.13447) uses 0.25, py-meanflow on CIFAR-10 0.75.
    start: the first step with such rows. Before it the network learns velocities alone, which is flow matching: average
        velocities are made of them (a curriculum after alpha-Flow, arXiv 2510.20771).
    t: "uniform" on [0, 1], or "logit_normal": sigmoid(t_mean + t_std * normal).
    r: "uniform" on [0, t]; "sorted": r and t are the smaller and larger of two draws from the law of t (MeanFlow);
        "logit_normal": its own draw sigmoid(r_mean + r_std * normal), then sorted with t; "zero": r = 0 (consistency).
    Raises ValueError for a share outside [0, 1], a negative start or spread, or an unknown law.
    """

    share: float = 0.25
    start: int = 0
    t: str = "uniform"
    t_mean: float = -0.4
    t_std: float = 1.0
    r: str = "uniform"
    r_mean: float = -0.4
    r_std: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"times.share is {self.share}: the share of r < t must lie in [0, 1]")
        if self.start < 0:
            raise ValueError(f"times.start is {self.start}: it is the number of a step, from 0")
        if self.t_std < 0 or self.r_std < 0:
            raise ValueError(
                f"times.t_std and times.r_std are {self.t_std} and {self.r_std}: they must not be negative"
            )
        if self.t not in _T_LAWS:
            raise ValueError(f"times.t is {self.t!r}: choose one of {', '.join(_T_LAWS)}")
        if self.r not in _R_LAWS:
            raise ValueError(f"times.r is {self.r!r}: choose one of {', '.join(_R_LAWS)}")

    def share_at(self, step: int) -> float:
        """The share of rows with r < t at a training step."""
        return self.share if step >= self.start else 0.0

    def intervals(self, batch: int, step: int, uniform: float = 0.5) -> int:
        """How many of `batch` rows have r < t: share * batch, a fraction rounded up with that chance if `uniform` is a
        draw in (0, 1), so that over the steps the share holds for any batch."""
        return min(batch, math.floor(round(self.share_at(step) * batch, 9) + uniform))

    def draw(self, stream: GlobalStream | NumberedStream) -> tuple[Tensor, Tensor]:
        """(r, t) with r < t, each (rows,), for every row of the stream; a row of r = t takes its t alone."""
        t = self._law(self.t, self.t_mean, self.t_std, stream)
        if self.r == "uniform":
            return t * stream.uniform(), t
        if self.r == "zero":
            return torch.zeros_like(t), t
        law = (self.t, self.t_mean, self.t_std) if self.r == "sorted" else (self.r, self.r_mean, self.r_std)
        other = self._law(*law, stream)
        return torch.minimum(other, t), torch.maximum(other, t)

    @staticmethod
    def _law(name: str, mean: float, std: float, stream: GlobalStream | NumberedStream) -> Tensor:
        return stream.uniform() if name == "uniform" else torch.sigmoid(mean + std * stream.normal())
