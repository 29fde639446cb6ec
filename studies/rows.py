"""The rows of a study, and what several seeds say together: mean and standard deviation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

__all__ = ["Row", "Rows", "Setting", "Spread", "compared", "cheapest", "table"]

Setting: TypeAlias = Mapping[str, Any]  # plain values: it is written as JSON
Row: TypeAlias = Mapping[str, Any]  # {"setting", "seed", "figures", "seconds", ...}: one run


class Spread(NamedTuple):
    """Mean and standard deviation (of a sample) of `seeds` runs. f"{spread:.3f}" is "0.254 ± 0.050"."""

    mean: float
    deviation: float
    seeds: int

    def __format__(self, form: str) -> str:
        if not self.seeds:
            return "not run yet"
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{self.mean:{form}}" + (f" ± {self.deviation:{form}}" if self.seeds > 1 else " (one seed)")

    def below(self, other: Spread) -> bool:
        """Beyond the error bars: mean plus deviation is less than the other's mean minus deviation, of two seeds each
        at least."""
        if min(self.seeds, other.seeds) < 2 or not math.isfinite(self.mean):
            return False
        return math.isinf(other.mean) or self.mean + self.deviation < other.mean - other.deviation


class Rows(list[Row]):
    """Rows of one study."""

    def where(self, **setting: Any) -> Rows:
        """The rows whose setting has these values, and perhaps others."""
        return Rows(row for row in self if setting.items() <= dict(row["setting"]).items())

    def spread(self, figure: str | Callable[[Mapping[str, float]], float], **setting: Any) -> Spread:
        """Of a figure, or of a function of the figures, over the rows `where` finds. A run that diverged has no finite
        figure (null in the file): then the mean is infinite."""
        take = figure if callable(figure) else lambda figures: figures[figure]
        found = [take({name: math.inf if value is None else value for name, value in row["figures"].items()})
                 for row in self.where(**setting)]  # fmt: skip
        return _spread(found)

    def ratio(self, figure: str, one: Setting, other: Setting, over: str | None = None) -> Spread:
        """Of a figure with one setting over that with another, or over the figure `over`, seed by seed."""
        first, second = (
            {row["seed"]: row["figures"][name] for row in self.where(**each)}
            for name, each in ((figure, one), (over or figure, other))
        )
        found = [
            first[seed] / second[seed] if None not in (first[seed], second[seed]) else math.inf
            for seed in first.keys() & second.keys()
        ]
        return _spread(found)


def _spread(found: Sequence[float]) -> Spread:
    if not found or not all(map(math.isfinite, found)):
        return Spread(math.inf if found else math.nan, math.nan, len(found))
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else math.nan, len(found))


def table(corner: str, columns: Sequence[str], lines: Mapping[str, Sequence[Any]], form: str = ".3f") -> str:
    """Markdown; lines: {name: cells}, of which spreads are written with `form`. Lines without a run are left out,
    and so is a table that has no others."""
    lines = {name: row for name, row in lines.items() if any(not isinstance(c, Spread) or c.seeds for c in row)}
    if not lines:
        return ""
    head = f"| {corner} | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1)
    cells = {name: [f"{cell:{form}}" if isinstance(cell, Spread) else str(cell) for cell in row]
             for name, row in lines.items()}  # fmt: skip
    return "\n".join([head, *(f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items())])


def cheapest(found: Mapping[Any, Spread]) -> Any:
    """Of settings in the order of their cost, the first that the best one is not below, beyond the error bars;
    of those with two seeds at least. None where there is none."""
    known = {name: spread for name, spread in found.items() if spread.seeds > 1 and math.isfinite(spread.mean)}
    best = min(known.values(), key=lambda spread: spread.mean, default=None)
    return next((name for name, spread in known.items() if best and not best.below(spread)), None)


def compared(one: Spread, other: Spread) -> str:
    """`one` beside `other`, in words: what a sentence may say of them."""
    if min(one.seeds, other.seeds) < 2:
        return "not known yet beside"
    return "less than" if one.below(other) else "more than" if other.below(one) else "within the error bars of"
