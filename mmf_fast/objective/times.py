"""Draws of (r, t): which average velocities a step trains. t = 1 is noise, t = 0 is data, 0 <= r <= t <= 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["TimeSampler"]

_T_LAWS = ("uniform", "logit_normal")
_R_LAWS = ("uniform", "sorted", "logit_normal", "zero")


@dataclass(frozen=True, kw_only=True)
class TimeSampler:
    """The law of (r, t). Rows with r = t come first; their number is a count, not a chance, so shapes are static.

    share: the share of rows with r < t, in [0, 1]. MeanFlow (arXiv 2505.13447) uses 0.25, py-meanflow on CIFAR-10 0.75.
    t: "uniform" on [0, 1], or "logit_normal": sigmoid(t_mean + t_std * normal).
    r: "uniform" on [0, t]; "sorted": r and t are the smaller and larger of two draws from the law of t (MeanFlow);
        "logit_normal": its own draw sigmoid(r_mean + r_std * normal), then sorted with t; "zero": r = 0 (consistency).
    Raises ValueError for a share outside [0, 1], a negative spread or an unknown law.
    """

    share: float = 0.25
    t: str = "uniform"
    t_mean: float = -0.4
    t_std: float = 1.0
    r: str = "uniform"
    r_mean: float = -0.4
    r_std: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"times.share is {self.share}: the share of r < t must lie in [0, 1]")
        if self.t_std < 0 or self.r_std < 0:
            raise ValueError(
                f"times.t_std and times.r_std are {self.t_std} and {self.r_std}: they must not be negative"
            )
        if self.t not in _T_LAWS:
            raise ValueError(f"times.t is {self.t!r}: choose one of {', '.join(_T_LAWS)}")
        if self.r not in _R_LAWS:
            raise ValueError(f"times.r is {self.r!r}: choose one of {', '.join(_R_LAWS)}")

    def intervals(self, batch: int) -> int:
        """How many of `batch` rows have r < t."""
        return round(self.share * batch)

    def draw(
        self,
        batch: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(r, t), each (batch,) of `dtype`: first the rows with r = t, then those with r < t."""
        options: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
        t = self._law(self.t, self.t_mean, self.t_std, batch, options)
        if self.r == "uniform":
            r = t * torch.rand(batch, **options)
        elif self.r == "zero":
            r = torch.zeros_like(t)
        else:
            law = (self.t, self.t_mean, self.t_std) if self.r == "sorted" else (self.r, self.r_mean, self.r_std)
            other = self._law(*law, batch, options)
            r, t = torch.minimum(other, t), torch.maximum(other, t)
        instants = batch - self.intervals(batch)
        return torch.cat([t[:instants], r[instants:]]), t

    @staticmethod
    def _law(name: str, mean: float, std: float, batch: int, options: dict[str, Any]) -> Tensor:
        if name == "uniform":
            return torch.rand(batch, **options)
        return torch.sigmoid(mean + std * torch.randn(batch, **options))
