"""Classifier-free guidance inside the target (MeanFlow, arXiv 2505.13447, section 4.2 and appendix): sampling stays
one evaluation, because the network learns the average velocity of the guided field.

    v_target = omega v + kappa u(z, t, t | c) + (1 - omega - kappa) u(z, t, t | null)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmf_fast.objective.draws import column

__all__ = ["Guidance"]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance of the target, of effective scale omega / (1 - kappa), for t in [t_min, t_max].

    omega: weight of the sample's own velocity; 1 with kappa = 0 is no guidance.
    kappa: weight of the class-conditional prediction, in [0, 1).
    dropout: chance that a row's condition is replaced by the null one; such a row keeps the plain target v.
    Raises ValueError outside these ranges.
    """

    omega: float = 1.0
    kappa: float = 0.0
    t_min: float = 0.0
    t_max: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.kappa < 1:
            raise ValueError(f"guidance.kappa is {self.kappa}: it must lie in [0, 1)")
        if self.omega <= 0:
            raise ValueError(f"guidance.omega is {self.omega}: it must be positive")
        if not 0 <= self.t_min <= self.t_max <= 1:
            raise ValueError(f"guidance interval is [{self.t_min}, {self.t_max}]: it must lie inside [0, 1]")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"guidance.dropout is {self.dropout}: it must lie in [0, 1]")

    @property
    def scale(self) -> float:
        """The effective guidance scale omega / (1 - kappa)."""
        return self.omega / (1 - self.kappa)

    @property
    def active(self) -> bool:
        """Whether the target differs from v at all."""
        return (self.omega, self.kappa) != (1.0, 0.0)

    def drop(self, cond: Tensor, null: Tensor | int, uniform: Tensor) -> Tensor:
        """Replace each row of cond (B, ...) by `null` with chance `dropout`; uniform (B,) are draws in [0, 1)."""
        return torch.where(column(uniform < self.dropout, cond), null, cond)

    def target(self, v: Tensor, u_class: Tensor | None, u_null: Tensor, t: Tensor, is_null: Tensor) -> Tensor:
        """v_target (B, ...) from v, u(z, t, t | c) (None: kappa = 0), u(z, t, t | null), and t, is_null (B,)."""
        guided = self.omega * v + (1 - self.omega - self.kappa) * u_null
        if u_class is not None:
            guided = guided + self.kappa * u_class
        applies = (t >= self.t_min) & (t <= self.t_max) & ~is_null
        return torch.where(column(applies, v), guided, v)
