"""Pictures of a run: one-step samples of a network, from the same noise at every call, and the curves of its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmf_fast.contract import per_sample, take
from mmf_fast.pictures import save_curves, save_grid
from mmf_fast.sampling import sample
from mmf_fast.training.record import read

__all__ = ["can_draw", "draw_curves", "draw_samples"]

CURVES = {"loss": "weighted loss", "mse": "raw error", "lam": "lambda", "grad_norm": "gradient norm"}


def can_draw(shape: Sequence[int]) -> bool:
    """Images of one channel or three, and points of the plane."""
    return tuple(shape) == (2,) or (len(shape) == 3 and shape[0] in (1, 3))


def draw_samples(
    net: nn.Module, shape: Sequence[int], path: Path, *, seed: int, classes: int, cond: dict[str, Any], x: Tensor,
    shown: Callable[[Tensor], dict[str, Tensor]] | None = None,
) -> bool:  # fmt: skip
    """Samples of `shape`, of each class where labels are all that the network is given, or else with the conditions
    (and the noise, where it is given) of the samples x, as a picture at `path`.

    shown: `Guidance.shown`, of a network that is told its guidance: images have it from row to row, points the lowest.
    Returns whether they were finite: of others no picture is drawn. Leaves torch's global generators alone.
    """
    by_class = bool(classes) and set(cond) <= {"y"}
    columns = min(classes, 10) if by_class else 8
    count = 2000 if len(shape) == 1 else 8 * columns
    if by_class:
        cond = {"y": torch.arange(count) % columns}
    elif cond:
        count = min(count, len(x))
        cond = take(cond, slice(count), per_sample(cond, len(x)))
    if "noise" in cond:  # of a coupling; in the dtype in which the loss takes it
        cond = {**cond, "noise": cond["noise"].to(torch.float64 if x.dtype == torch.float64 else torch.float32)}
    if shown:
        down = torch.arange(count) // columns / max(1, (count - 1) // columns)
        cond = {**cond, **shown(down if len(shape) > 1 else torch.zeros(count))}
    drawn = sample(net, (count, *shape), seed=None if "noise" in cond else seed, **cond)
    finite = bool(torch.isfinite(drawn).all())
    if finite:
        save_grid(drawn.cpu(), path, columns)
    return finite


def draw_curves(run: Path) -> Path:
    """Draws loss, raw error, lambda and gradient norm over the steps into curves.png and returns its path."""
    records, path = read(run / "metrics.jsonl"), run / "curves.png"
    points = {key: [(each["step"], each[key]) for each in records if each.get(key) is not None] for key in CURVES}
    curves = {CURVES[key]: np.array(found, dtype=float).reshape(-1, 2) for key, found in points.items()}
    save_curves(curves, path, logarithmic={CURVES["mse"], CURVES["grad_norm"]})
    return path
