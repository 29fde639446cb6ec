"""Two runs of the same benchmarks: python -m benchmarks.compare OLD.json NEW.json (make bench-compare)

Prints every ratio that changed, and ends with status 1 where one got worse by more than 5 % and more than its spread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import read

LIMIT = 0.05

Figure = tuple[float, tuple[float, float], bool]  # a ratio, its quartiles, and whether more is better


def figures(run: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """(what, figure) of every ratio that a run holds."""
    for row in run["rows"]:
        if row["suite"] == "step" and "ratio" in row:
            what = f"{row['network']}, {row['mode']}, {row['precision']}: {row['name']}"
            yield what, (row["ratio"], tuple(row["quartiles"]), False)
        elif row["suite"] == "kernels":
            found = row["speedup over"]["composed"]
            what = f"{row['op']} {row['shape']}, {row['mode']}, {row['precision']}: over composed"
            yield what, (found["ratio"], tuple(found["quartiles"]), True)
        elif row["suite"] == "memory":
            ratio = row["over flow matching"]
            yield f"memory, {row['network']}: {row['name']}", (ratio, (ratio, ratio), False)


def worse(old: Figure, new: Figure) -> bool:
    """By more than LIMIT, and so that the quartiles of the two do not overlap."""
    if new[2]:
        return new[0] < old[0] / (1 + LIMIT) and new[1][1] < old[1][0]
    return new[0] > old[0] * (1 + LIMIT) and new[1][0] > old[1][1]


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Figure, Figure]]:
    """What both hold. Raises ValueError where they share nothing."""
    before, after = dict(figures(old)), dict(figures(new))
    both = [(what, before[what], after[what]) for what in before if what in after]
    if not both:
        raise ValueError("the two runs share no case: were both made by pytest benchmarks --benchmark-json?")
    return both


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    try:
        old, new = (read(path) for path in (options.old, options.new))
        rows = compare(old, new)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if old["machine"]["device"] != new["machine"]["device"]:
        print(f"warning: measured on {old['machine']['device']} and on {new['machine']['device']}", file=sys.stderr)
    failed = 0
    for what, before, after in sorted(rows, key=lambda row: -abs(row[2][0] / row[1][0] - 1)):
        change = after[0] / before[0] - 1
        failed += worse(before, after)
        if abs(change) > LIMIT:
            mark = "WORSE " if worse(before, after) else "      "
            print(f"{mark}{what}: {before[0]:.3f} -> {after[0]:.3f} ({change:+.1%})")
    print(f"{len(rows)} ratios compared, {failed} worse by more than {LIMIT:.0%} and their spread")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
