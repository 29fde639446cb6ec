"""Classifier-free guidance inside the target: sampling stays one evaluation, because the network learns the average
velocity of the guided field.

    v_target = omega v + kappa u(z, t, t | c) + (1 - omega - kappa) u(z, t, t | null)     of scale omega / (1 - kappa)
    v_target = v + (1 - 1 / omega) (u(z, t, t | c) - u(z, t, t | null))                   of scale omega

The first is MeanFlow's (arXiv 2505.13447, section 4.2 and appendix), of one scale for good. The second is that of
improved MeanFlow (arXiv 2512.02012): each row draws a scale, and the network is told it, u(z, r, t | c, omega), so that
it is chosen when samples are drawn. It is the first with 1 for omega and 1 - 1 / omega for kappa.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mmf_fast.contract import GUIDANCE
from mmf_fast.objective.draws import column
from mmf_fast.objective.streams import GlobalStream, NumberedStream

__all__ = ["Guidance", "like_rows"]

Range: TypeAlias = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance of the target for t in [t_min, t_max].

    omega: weight of the sample's own velocity; 1 with kappa = 0 is no guidance. Or a range such as (1, 8): each row
        draws its scale there, with density proportional to 1 / omega, and the network is told it as `omega` (B,).
    kappa: weight of the class-conditional prediction, in [0, 1); 0 beside a range, where it is 1 - 1 / omega.
    t_min, t_max: limits of t. Beside a range of omega each may be a range too, such as (0, 0.5) and (0.5, 1): rows draw
        them uniformly, and the network is told them as `t_min` and `t_max` (B,).
    dropout: chance that a row's condition is replaced by the null one; such a row keeps the plain target v.
    Raises ValueError outside these ranges.
    """

    omega: float | Range = 1.0
    kappa: float = 0.0
    t_min: float | Range = 0.0
    t_max: float | Range = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in GUIDANCE:
            if isinstance(getattr(self, name), (list, tuple)):
                object.__setattr__(self, name, tuple(getattr(self, name)))
                if len(getattr(self, name)) != 2:
                    raise ValueError(f"guidance.{name} is {getattr(self, name)}: a range is a pair, such as (1, 8)")
        if not 0 <= self.kappa < 1:
            raise ValueError(f"guidance.kappa is {self.kappa}: it must lie in [0, 1)")
        if not isinstance(self.omega, tuple):
            if self.omega <= 0:
                raise ValueError(f"guidance.omega is {self.omega}: it must be positive")
        elif not 1 <= self.omega[0] <= self.omega[1] < math.inf:
            raise ValueError(f"guidance.omega is {self.omega}: a range of scales must rise, from 1 or more")
        elif self.kappa:
            raise ValueError(
                f"guidance.kappa is {self.kappa}: beside a range of omega it is 1 - 1 / omega; leave it out"
            )
        (first, start), (end, last) = _range(self.t_min), _range(self.t_max)
        if not 0 <= first <= start <= end <= last <= 1:
            raise ValueError(f"guidance interval is [{self.t_min}, {self.t_max}]: its limits must rise within [0, 1]")
        if self.told and self.told[0] != "omega":
            raise ValueError(f"guidance.{self.told[0]} is a range: so must guidance.omega be, such as (1, 8)")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"guidance.dropout is {self.dropout}: it must lie in [0, 1]")

    @property
    def told(self) -> tuple[str, ...]:
        """What each row draws and the network is told."""
        return tuple(name for name in GUIDANCE if isinstance(getattr(self, name), tuple))

    @property
    def active(self) -> bool:
        """Whether the target differs from v at all."""
        return (self.omega, self.kappa) != (1.0, 0.0)

    @property
    def by_class(self) -> bool:
        """Whether u(z, t, t | c) is asked for."""
        return self.kappa > 0 or bool(self.told)

    def tell(self, cond: Mapping[str, Any], stream: GlobalStream | NumberedStream) -> dict[str, Any]:
        """cond, and what each row draws. Raises ValueError where cond holds something of these names."""
        for name in self.told:
            if name in cond:
                raise ValueError(f"{name}= was given, but guidance.{name} is a range: the loss draws it; leave it out")
        return {**cond, **self._within({name: stream.uniform() for name in self.told})}

    def shown(self, share: Tensor) -> dict[str, Tensor]:
        """What samples are told that show the range: omega from the lowest at a share of 0 to the highest at 1, and the
        widest limits. share: (B,)."""
        shares = {"omega": share, "t_min": torch.zeros_like(share), "t_max": torch.ones_like(share)}
        return self._within(shares)

    def _within(self, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each range at its share (B,) in [0, 1], omega by ratios: of a uniform share its density is 1 / omega."""
        found = {}
        for name in self.told:
            (low, high), share = getattr(self, name), shares[name]
            found[name] = low * (high / low) ** share if name == "omega" else low + (high - low) * share
        return found

    def drop(self, cond: Mapping[str, Any], nulls: Mapping[str, Tensor], uniform: Tensor) -> dict[str, Any]:
        """cond, its rows replaced by those of `nulls` with chance `dropout`; uniform (B,) are draws in [0, 1]. Raises
        ValueError for a condition that is missing or has no row for each of them."""
        for name in nulls:
            given = cond.get(name)
            if not isinstance(given, Tensor) or len(given) != len(uniform):
                what = "labels" if name == "y" else name
                raise ValueError(f"guidance needs {what}, one row per sample: call loss_fn(x, {name}={what})")
        dropped = {
            name: torch.where(column(uniform < self.dropout, cond[name]), null, cond[name])
            for name, null in like_rows(nulls, cond).items()
        }
        return {**cond, **dropped}

    def target(
        self, v: Tensor, u_class: Tensor | None, u_null: Tensor, t: Tensor, is_null: Tensor, cond: Mapping[str, Any]
    ) -> Tensor:
        """v_target (B, ...) from v, u(z, t, t | c) (None: not `by_class`), u(z, t, t | null), and t, is_null (B,).

        cond: holds what each row has drawn.
        """
        omega: Any = self.omega
        kappa: Any = self.kappa
        if self.told:
            omega, kappa = 1.0, column(1 - 1 / cond["omega"], v)
        guided = omega * v + (1 - omega - kappa) * u_null
        if u_class is not None:
            guided = guided + kappa * u_class
        t_min, t_max = (cond[name] if name in self.told else getattr(self, name) for name in ("t_min", "t_max"))
        applies = (t >= t_min) & (t <= t_max) & ~is_null
        return torch.where(column(applies, v), guided, v)


def like_rows(nulls: Mapping[str, Tensor], cond: Mapping[str, Any]) -> dict[str, Tensor]:
    """The null values of conditions, as many rows of each as there are of the condition. Of integers they keep their
    own dtype where that is wider: 256 classes fit into uint8, and their null label does not."""
    found = {}
    for name, null in nulls.items():
        given = cond[name]
        integers = not (null.is_floating_point() or given.is_floating_point())
        dtype = torch.promote_types(null.dtype, given.dtype) if integers else given.dtype
        found[name] = null.to(given.device, dtype).expand_as(given)
    return found


def _range(limit: float | Range) -> Range:
    return limit if isinstance(limit, tuple) else (limit, limit)
