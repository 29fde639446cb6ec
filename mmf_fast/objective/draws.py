"""The points (z, r, t) of the path that one step trains on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmf_fast.objective.times import TimeSampler
from mmf_fast.ops.dispatch import fused
from mmf_fast.ops.interpolate import interpolate

__all__ = ["Draw", "BatchShare", "Points", "check", "draw"]


@dataclass(frozen=True)
class BatchShare:
    """Rows index, index + count, index + 2 count, ... of a global batch: what one of `count` calls sees of it.

    Noise, times and dropped labels are drawn for the global batch from (seed, step) alone and this part is kept, so a
    step is the same however many processes and accumulation steps share it. By default a call sees the whole batch and
    draws from the global generator.
    """

    index: int = 0
    count: int = 1
    seed: int | None = None

    def generator(self, step: int, device: torch.device) -> torch.Generator | None:
        """At the start of what this step draws. The hash makes seeds that differ in one bit unrelated."""
        if self.seed is None:
            return None
        digest = hashlib.blake2b(f"{self.seed} {step}".encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))

    def of(self, drawn: Tensor) -> Tensor:
        return drawn if self.count == 1 else drawn[self.index :: self.count].clone()


WHOLE_BATCH = BatchShare()


class Points(NamedTuple):
    """Where the network is evaluated. z: (B, ...). r, t: (B,). cond: keyword arguments of the network."""

    z: Tensor
    r: Tensor
    t: Tensor
    cond: dict[str, Any]

    def rows(self, start: int, stop: int) -> Points:
        batch = len(self.t)
        return Points(
            self.z[start:stop], self.r[start:stop], self.t[start:stop], _rows(self.cond, slice(start, stop), batch)
        )


class Draw(NamedTuple):
    """What is random in a step. The first `instants` rows have r = t, the others r < t.

    pair: for each row with r < t, the row with r = t that shares its x, noise and t (None: not paired).
    order: for each row, the row of the given data whose loss it is (None: the same).
    """

    x: Tensor
    noise: Tensor
    r: Tensor
    t: Tensor
    cond: dict[str, Any]
    instants: int
    pair: Tensor | None = None
    order: Tensor | None = None

    def on_path(self) -> tuple[Points, Tensor]:
        """z_t = (1 - t) x + t eps = x + t v and its conditional velocity v = eps - x."""
        if fused("interpolate", self.noise):
            z, v = interpolate(self.x, self.noise, self.t)
        else:
            x = self.x / 127.5 - 1 if self.x.dtype == torch.uint8 else self.x
            v = self.noise - x
            z = x + column(self.t, v) * v
        return Points(z, self.r, self.t, self.cond), v


def draw(
    x: Tensor,
    noise: Tensor | None,
    times: tuple[Tensor, Tensor] | None,
    cond: dict[str, Any],
    sampler: TimeSampler,
    paired: bool = False,
    shuffled: bool = False,
    part: BatchShare = WHOLE_BATCH,
    generator: torch.Generator | None = None,
) -> Draw:
    """Draw what is not given and sort the rows, of arguments that pass `check`. shuffled: the rows with r < t begin at
    a random one of them. generator: None is the global one.

    Raises ValueError where parts cannot share the rows with r < t equally, or a row has no partner.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    order = None
    whole = len(x) * part.count
    if times is None:
        intervals = sampler.intervals(whole)
        if intervals % part.count:
            raise ValueError(
                f"times.share {sampler.share} of a batch of {whole} is {intervals} rows with r < t, which "
                f"{part.count} parts cannot share equally: choose another batch or share"
            )
        instants = len(x) - intervals * len(x) // whole
        r, t = map(part.of, sampler.draw(whole, x.device, dtype, generator))
    else:
        r, t = (time.to(x.device, dtype) for time in times)
        instants = int((r == t).sum())
        order = torch.argsort((r < t).int(), stable=True)
    if noise is None:
        noise = part.of(torch.randn(whole, *x.shape[1:], dtype=dtype, device=x.device, generator=generator))
    noise = noise.to(dtype)
    x = x if x.dtype == torch.uint8 else x.to(dtype)
    intervals = len(x) - instants
    pair = torch.arange(intervals, device=x.device)
    if shuffled:
        # A random rotation of the global batch's rows: its first rows are a fair sample of all, whose places differ by
        # one, so that every part holds its share of them.
        total = intervals * part.count
        shift = torch.randint(max(1, total), (), device=x.device, generator=generator)
        pair = part.of((torch.arange(total, device=x.device) - shift) % max(1, total)).argsort()
        order = torch.arange(len(x), device=x.device) if order is None else order
        order = torch.cat([order[:instants], order[instants:][pair]])
    if order is not None:
        r, t = r[order], t[order]
    source = order
    if paired:
        if intervals > instants:
            raise ValueError(f"paired: {intervals} samples with r < t need as many with r = t, there are {instants}")
        source = torch.arange(len(x), device=x.device) if order is None else order
        source = torch.cat([source[:instants], source[pair]])
        t = t.index_copy(0, pair, t[instants:])
    if source is not None:
        x, noise, cond = x[source], noise[source], _rows(cond, source, len(x))
    return Draw(x, noise, r, t, cond, instants, pair if paired else None, order)


def column(time: Tensor, like: Tensor) -> Tensor:
    """(B,) times as (B, 1, ..., 1), to multiply `like`."""
    return time.view(-1, *[1] * (like.ndim - 1))


def _rows(cond: dict[str, Any], rows: Any, batch: int) -> dict[str, Any]:
    def has_rows(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch

    return {name: value[rows] if has_rows(value) else value for name, value in cond.items()}


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
