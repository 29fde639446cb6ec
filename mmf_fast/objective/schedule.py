"""The lambda curriculum of Modular MeanFlow (arXiv 2508.17426): how much gradient flows through the tangent when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LambdaSchedule"]

_KINDS = ("constant", "linear", "cosine", "step", "piecewise")


@dataclass(frozen=True, kw_only=True)
class LambdaSchedule:
    """lambda(step) in [0, 1].

    With f = (step - start) / warmup, clipped to [0, 1]:
        constant    value
        linear      value * f                        (the paper's min(1, step / T_warmup))
        cosine      value * (1 - cos(pi f)) / 2
        step        0 before `start`, then value
        piecewise   linear between `points`, pairs (step, lambda) in rising order; constant outside

    Raises ValueError for a lambda outside [0, 1], an unknown kind, a curriculum without its warm-up or points.
    """

    kind: str = "constant"
    value: float = 1.0
    start: int = 0
    warmup: int = 0
    points: Sequence[Sequence[float]] = ()

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"lam.kind is {self.kind!r}: choose one of {', '.join(_KINDS)}")
        if isinstance(self.value, str):
            raise ValueError(f"lam is {self.value!r}: give a number in [0, 1], or LambdaSchedule(kind=...)")
        if not 0 <= self.value <= 1:
            raise ValueError(f"lam.value is {self.value}: lambda must lie in [0, 1]")
        if self.kind in ("linear", "cosine") and self.warmup <= 0:
            raise ValueError(f"lam.warmup is {self.warmup}: a {self.kind} curriculum needs a positive number of steps")
        if self.kind == "piecewise":
            if not self.points:
                raise ValueError("lam.points is empty: a piecewise curriculum needs pairs (step, lambda)")
            if any(len(point) != 2 or not 0 <= point[1] <= 1 for point in self.points):
                raise ValueError(f"lam.points is {self.points}: give pairs (step, lambda) with lambda in [0, 1]")
            steps = [point[0] for point in self.points]
            if any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
                raise ValueError(f"lam.points has steps {steps}: they must rise")

    @property
    def maximum(self) -> float:
        """The largest lambda the schedule reaches."""
        return max(point[1] for point in self.points) if self.kind == "piecewise" else self.value

    def __call__(self, step: int) -> float:
        if self.kind == "constant":
            return self.value
        if self.kind == "step":
            return self.value if step >= self.start else 0.0
        if self.kind == "piecewise":
            return self._interpolate(step)
        f = min(1.0, max(0.0, (step - self.start) / self.warmup))
        return self.value * (f if self.kind == "linear" else (1 - math.cos(math.pi * f)) / 2)

    def _interpolate(self, step: int) -> float:
        before = [point for point in self.points if point[0] <= step]
        after = [point for point in self.points if point[0] > step]
        if not before or not after:
            return (before[-1] if before else after[0])[1]
        (s0, lam0), (s1, lam1) = before[-1], after[0]
        return lam0 + (lam1 - lam0) * (step - s0) / (s1 - s0)
