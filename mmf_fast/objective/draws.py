"""The points (z, r, t) of the path that one step trains on: which rows have r < t, their times, noise and order.

A row is an *instant* where r = t, which is flow matching, and an *interval* where r < t. The network sees the instants
first, then the intervals whose tangent back-propagates, then the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmf_fast.contract import Paths, sent, take
from mmf_fast.objective.streams import GlobalStream, NumberedStream, hashed

__all__ = [
    "BatchShare",
    "Draw",
    "Kinds",
    "Points",
    "arrange",
    "chances",
    "check",
    "column",
    "draw_kinds",
    "given_kinds",
]

# Multiples of these modulo 1 fill the unit square evenly (the plastic number rho: rho^3 = rho + 1; 1 / rho, 1 / rho^2).
EVEN = (0.7548776662466927, 0.5698402909980532)


@dataclass(frozen=True)
class BatchShare:
    """Rows [index B, (index + 1) B) of a global batch of count B rows: what one of `count` calls sees of it.

    Kinds of rows, times, noise and dropped labels are functions of (seed, step, row of the global batch) alone, so a
    step is the same however many processes and accumulation steps share it, and each draws its own rows only. By
    default a call sees the whole batch and draws from torch's global generators.
    """

    index: int = 0
    count: int = 1
    seed: int | None = None

    def of(self, whole: Tensor) -> Tensor:
        """Its rows of a tensor of the global batch."""
        size = len(whole) // self.count
        return whole[self.index * size : (self.index + 1) * size]

    def stream(self, step: int, x: Tensor, dtype: torch.dtype) -> GlobalStream | NumberedStream:
        """The random numbers of its rows x."""
        rows, options = len(x), (x.device, dtype, x.shape[1:])
        if self.seed is None:
            return GlobalStream(rows, *options)
        return NumberedStream(self.seed, step, self.index * rows, rows, *options)

    def phases(self, step: int) -> list[float]:
        """Two numbers in [0, 1), the same for all parts of a batch."""
        if self.seed is None:
            return torch.rand(2, dtype=torch.float64).tolist()
        bits = hashed(self.seed, step)
        return [int.from_bytes(half, "little") / 2**32 for half in (bits[:4], bits[4:])]


WHOLE_BATCH = BatchShare()


def chances(step: int | None, part: BatchShare = WHOLE_BATCH) -> list[float]:
    """Two numbers in (0, 1), equal on all ranks, which decide whether a fractional count of rows is rounded up at this
    step. Over the steps they fill the unit square evenly; without a step they come from torch's global generator."""
    if step is None and part.seed is None:
        return torch.rand(2).tolist()
    return [((step or 0) + 0.5) * multiple % 1.0 for multiple in EVEN]


# ---- which rows are intervals ----------------------------------------------------------------------------------------


class Kinds(NamedTuple):
    """The rows of a part by kind, on the CPU.

    partners: for each interval, with a graph or without, the instant that shares its x, noise and t (None: not paired).
    intervals, graphs: how many intervals the global batch has, and how many of them have a graph.
    """

    instants: Tensor
    with_graph: Tensor
    without_graph: Tensor
    partners: Tensor | None
    intervals: int
    graphs: int


def draw_kinds(rows: int, part: BatchShare, step: int, intervals: int, graphs: int, paired: bool) -> Kinds:
    """Spreads the intervals of the global batch evenly over its rows, and the graphs evenly over the intervals, so that
    any part of consecutive rows has its share, rounded up or down, whatever the number of parts.

    Random phases make every row equally often an interval, and every interval equally often one with a graph. paired:
    of two consecutive rows of a part at most the second is an interval, and the first its partner. A batch of one row
    has no partner to give: its interval stands alone.
    Raises ValueError where pairs would not lie within the parts of a batch.
    """
    if paired and rows % 2 and part.count > 1:
        raise ValueError(
            f"paired: two rows make a pair, and each of the {part.count} parts of this batch has {rows}; choose an "
            "even number of rows for each process and accumulation step, or paired=False"
        )
    unit = 2 if paired and rows > 1 else 1
    own = rows // unit
    whole = own * part.count
    intervals = min(intervals, whole)
    graphs = min(graphs, intervals)
    phases = part.phases(step)
    earlier, chosen = _spread(part.index * own, own, intervals, whole, phases[0])
    later = chosen.nonzero()[:, 0] * unit + unit - 1
    _, keeps = _spread(earlier, len(later), graphs, intervals, phases[1])
    instant = torch.ones(rows, dtype=torch.bool)
    instant[later] = False
    later = torch.cat([later[keeps], later[~keeps]])
    kept = int(keeps.sum())
    partners = later - 1 if unit == 2 else None
    return Kinds(instant.nonzero()[:, 0], later[:kept], later[kept:], partners, intervals, graphs)


def _spread(start: int, places: int, count: int, whole: int, phase: float) -> tuple[int, Tensor]:
    """`count` of `whole` places, evenly spread: how many come before place `start`, and which of the places from there
    on are chosen."""
    shift = math.floor(phase * whole)
    before = (torch.arange(start, start + places + 1) * count + shift) // max(whole, 1)
    return int(before[0]), before[1:] > before[:-1]


def given_kinds(r: Tensor, t: Tensor, graphs: int, paired: bool) -> Kinds:
    """The kinds of rows whose times are given; a random choice of the intervals has a graph, and the partner of
    interval number i is instant number i. Raises ValueError where there is none."""
    interval = (r < t).cpu()
    instants, later = (~interval).nonzero()[:, 0], interval.nonzero()[:, 0]
    if paired and len(later) > len(instants):
        raise ValueError(f"paired: {len(later)} samples with r < t need as many with r = t, there are {len(instants)}")
    order = torch.randperm(len(later)) if 0 < graphs < len(later) else torch.arange(len(later))
    later = later[order]
    partners = instants[order] if paired else None
    return Kinds(instants, later[:graphs], later[graphs:], partners, len(later), graphs)


# ---- times and order -------------------------------------------------------------------------------------------------


class Points(NamedTuple):
    """Where the network is evaluated. z: (B, ...). r, t: (B,). cond: keyword arguments of the network; paths: where in
    them leaves have one row per point."""

    z: Tensor
    r: Tensor
    t: Tensor
    cond: dict[str, Any]
    paths: Paths

    def rows(self, start: int, stop: int) -> Points:
        cut = slice(start, stop)
        return Points(self.z[cut], self.r[cut], self.t[cut], take(self.cond, cut, self.paths), self.paths)


class Draw(NamedTuple):
    """What is random in a step, in the order in which the network sees it.

    sizes: how many instants, intervals with and without a graph there are. weights: the share of the loss that each of
    them has, 0 for a row that is there only because other ranks have such rows and all must call the network alike.
    pair: for each interval, the place of the instant that shares its x, noise and t (None: not paired).
    """

    x: Tensor
    noise: Tensor
    r: Tensor
    t: Tensor
    cond: dict[str, Any]
    paths: Paths
    sizes: tuple[int, int, int]
    weights: tuple[float, float, float]
    pair: Tensor | None

    def counted(self, rows: Tensor) -> Tensor:
        """Of a tensor with an element for each row of the draw, the elements of the rows that count."""
        kinds = zip(rows.split(self.sizes), self.weights, strict=True)
        return torch.cat([part for part, weight in kinds if weight])

    def on_path(self) -> tuple[Points, Tensor]:
        """z_t = (1 - t) x + t eps = x + t v and its conditional velocity v = eps - x; stored images (uint8) stand for
        [-1, 1], and this is where they become numbers."""
        x = self.x / 127.5 - 1 if self.x.dtype == torch.uint8 else self.x
        v = self.noise - x
        z = x + column(self.t, v) * v
        return Points(z, self.r, self.t, self.cond, self.paths), v


def arrange(
    x: Tensor, noise: Tensor, r: Tensor, t: Tensor, cond: dict[str, Any], paths: Paths, kinds: Kinds,
    padded: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Draw, Tensor]:  # fmt: skip
    """The draw in the order of its kinds, and for each row that counts the row of the given data whose loss it is.

    An interval takes x, noise and condition of its partner, whose time becomes that of the interval. padded: kinds of
    which one row is evaluated even where there is none.
    """
    groups = [_at_least(pad, rows) for rows, pad in zip(kinds[:3], padded, strict=True)]
    now = len(groups[0])
    data = torch.cat(groups)
    times, pair = data.clone(), None
    if kinds.partners is not None:
        partners = kinds.partners.split([len(kinds.with_graph), len(kinds.without_graph)])
        data[now:] = torch.cat([_at_least(pad, rows) for rows, pad in zip(partners, padded[1:], strict=True)])
        times[torch.searchsorted(kinds.instants, kinds.partners)] = torch.cat(kinds[1:3])
        pair = sent(torch.searchsorted(kinds.instants, data[now:]), x.device)
    data, times = sent(data, x.device), sent(times, x.device)
    r, t = r[times], t[times]
    r = torch.cat([t[:now], r[now:]])
    drawn = Draw(
        x[data], noise[data], r, t, take(cond, data, paths), paths, tuple(map(len, groups)),  # type: ignore[arg-type]
        tuple(len(rows) / len(x) for rows in kinds[:3]), pair,  # type: ignore[arg-type]
    )  # fmt: skip
    return drawn, sent(torch.cat(kinds[:3]), x.device)


def _at_least(one: bool, rows: Tensor) -> Tensor:
    return rows.new_zeros(1) if one and not len(rows) else rows


def column(time: Tensor, like: Tensor) -> Tensor:
    """(B,) times as (B, 1, ..., 1), to multiply `like`."""
    return time.view(-1, *[1] * (like.ndim - 1))


def check(x: Tensor, noise: Tensor | None, times: tuple[Tensor, Tensor] | None, cond: dict[str, Any]) -> None:
    """Raises ValueError for shapes that do not fit, r > t, times outside [0, 1], data not floating-point nor uint8."""
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise ValueError(f"x is {x.dtype}: give floating-point data, or images as uint8")
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: it needs a batch of at least one sample, (B, ...)")
    if noise is not None and noise.shape != x.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, x {tuple(x.shape)}: they must be equal")
    y = cond.get("y")
    if isinstance(y, Tensor) and y.shape != x.shape[:1]:
        raise ValueError(f"labels y have shape {tuple(y.shape)}: expected ({len(x)},), one per sample")
    if times is None:
        return
    for name, time in zip("rt", times, strict=True):
        if time.shape != x.shape[:1]:
            raise ValueError(f"times: {name} has shape {tuple(time.shape)}, expected ({len(x)},), one per sample")
    r, t = times
    if not bool(((r >= 0) & (r <= t) & (t <= 1)).all()):
        raise ValueError("times: 0 <= r <= t <= 1 does not hold for every sample")
