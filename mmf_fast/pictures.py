"""Pictures: grids of images, named rows of images, scatter plots, the learned field of a toy, the curves of a run.

They are drawn on matplotlib's Agg canvas without pyplot, so no backend of the calling program is touched; matplotlib is
imported when the first picture is drawn. All functions write whole files or none, and raise ValueError when a picture
cannot be drawn or written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmf_fast.files import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["save_arrows", "save_curves", "save_field", "save_grid", "save_rows"]

_DATA, _SAMPLES, _NOISE = "#4C72B0", "#C44E52", "#8C8C8C"


# ---- samples ---------------------------------------------------------------------------------------------------------


def save_grid(x: Tensor, path: str | Path, columns: int = 8) -> None:
    """Write samples x as a picture: images (N, 1 or 3, H, W) in [-1, 1] as a grid, points (N, 2) as a scatter plot.

    columns: images per row; a last row that is not full is filled up with white. Small images are enlarged without
    smoothing. Raises ValueError for other shapes and fewer than 1 column.
    """
    if x.ndim == 2 and x.shape[1] == 2:
        figure, (axes,) = _panels(1)
        _scatter(axes, x, _SAMPLES)
        _same_limits([axes], [x])
        _save(figure, path)
    else:
        _save_array(_tile(x, columns), path)


def save_rows(rows: Mapping[str, Tensor], path: str | Path) -> None:
    """Write one row of images (N, 1 or 3, H, W) in [-1, 1] per entry, the same N in each, with its name at the left."""
    columns = max(len(x) for x in rows.values())
    grids = [_tile(x, columns) for x in rows.values()]
    height, width = grids[0].shape[:2]
    figure = _figure(width / 80 + 1.6, len(rows) * height / 80)
    for i, (name, grid) in enumerate(zip(rows, grids, strict=True)):
        left = 1.6 / (width / 80 + 1.6)
        axes = figure.add_axes((left, 1 - (i + 1) / len(rows), 1 - left, 1 / len(rows)))
        axes.imshow(grid, interpolation="nearest", cmap="gray")
        axes.set_axis_off()
        figure.text(left - 0.01, 1 - (i + 0.5) / len(rows), name, ha="right", va="center")
    _save(figure, path)


def _tile(x: Tensor, columns: int) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] -> one uint8 picture (Y, X, 3) of `columns` images per row on white."""
    if x.ndim != 4 or x.shape[1] not in (1, 3) or len(x) == 0:
        raise ValueError(
            f"cannot draw samples of shape {tuple(x.shape)}: give points (N, 2) or images (N, 1 or 3, H, W)"
        )
    if columns < 1:
        raise ValueError(f"columns is {columns}: a grid needs at least 1")
    columns = min(columns, len(x))
    rows = -(-len(x) // columns)
    scale, gap = max(1, 48 // x.shape[-1]), 2
    pixels = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
    pixels = pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    height, width = pixels.shape[2] + gap, pixels.shape[3] + gap
    canvas = np.full((rows * height + gap, columns * width + gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        top, left = i // columns * height + gap, i % columns * width + gap
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


# ---- toys ------------------------------------------------------------------------------------------------------------


def save_field(
    velocity: Callable[[Tensor, float], Tensor],
    data: Tensor,
    path: str | Path,
    times: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.1),
) -> None:
    """Draw the learned field of a toy, one panel per time: arrows -u(z, t, t), the way sampling moves the points.

    velocity: (z (N, 2), t) -> u(z, t, t) (N, 2).
    data: points (N, 2); (1-t) x + t e lies behind the arrows, which are drawn only where such points are.
    """
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    figure, panels = _panels(len(times))
    mesh = torch.stack(torch.meshgrid(*[torch.linspace(-2.6, 2.6, 20)] * 2, indexing="xy"), dim=-1).flatten(0, 1)
    for axes, t in zip(panels, times, strict=True):
        z = (1 - t) * data + t * noise
        near = mesh[torch.cdist(mesh, z).min(dim=1).values < 0.2]
        u = velocity(near, t).detach().float().cpu()
        _scatter(axes, z[:2000], _NOISE, alpha=0.6)
        speed = u.norm(dim=1)
        direction = -u / speed.clamp_min(1e-12)[:, None] * speed.clamp_max(3)[:, None]
        axes.quiver(*near.T, *direction.T, speed, cmap="viridis", clim=(0, 3), angles="xy", scale=16, width=0.007)
        axes.set_title(f"t = {t:g}")
        axes.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7))
    figure.suptitle("Learned field −u(z, t, t): where sampling moves a point at time t (brighter is faster)")
    _save(figure, path)


def save_arrows(noise: Tensor, x: Tensor, data: Tensor, path: str | Path, arrows: int = 150) -> None:
    """Draw one-step samples of a toy, some as arrows from their noise, all as points, beside the data; each (N, 2)."""
    figure, panels = _panels(3)
    way, samples, truth = panels
    start, move = noise[:arrows].cpu(), (x - noise)[:arrows].cpu()
    to_scale: dict[str, Any] = dict(angles="xy", scale_units="xy", scale=1, width=0.003, headwidth=5)
    way.quiver(*start.T, *move.T, color=_NOISE, alpha=0.7, **to_scale)
    _scatter(way, start, _NOISE, size=6, alpha=1)
    _scatter(way, x[:arrows], _SAMPLES, size=6, alpha=1)
    way.set_title("one step: ε → ε − u(ε, 0, 1)")
    _scatter(samples, x, _SAMPLES)
    samples.set_title("one-step samples")
    _scatter(truth, data, _DATA)
    truth.set_title("data")
    _same_limits(panels, [1.3 * data])  # the tails of the noise would make the rest small
    _save(figure, path)


# ---- curves ----------------------------------------------------------------------------------------------------------


def save_curves(curves: Mapping[str, np.ndarray], path: str | Path, logarithmic: Collection[str] = ()) -> None:
    """Write one panel per entry, two beside each other: its points (N, 2) of (step, value), and their running mean.

    logarithmic: which of them have such an axis, where all values are above 0.
    """
    rows = -(-len(curves) // 2)
    figure = _figure(10, 3 * rows, layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).flat
    for axes, (title, points) in zip(panels, curves.items(), strict=False):
        steps, values = points.T
        axes.plot(steps, values, linewidth=0.6, alpha=0.4, color="tab:blue")
        axes.plot(steps, _smooth(values), linewidth=1.5, color="tab:blue")
        if title in logarithmic and len(values) and values.min() > 0:
            axes.set_yscale("log")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    _save(figure, path)


def _smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Centred running mean over `share` of the points; the window shrinks at the ends."""
    half = int(len(values) * share / 2)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


# ---- matplotlib ------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float, **options: Any) -> Figure:
    from matplotlib.figure import Figure  # imported here: it takes long, and training without pictures needs none

    return Figure(figsize=(width, height), dpi=120, **options)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A row of square panels with equal axes and no ticks."""
    figure = _figure(3.2 * count + 0.4, 3.6 if count > 1 else 3.4, layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.set(aspect="equal", xticks=[], yticks=[])
    return figure, panels


def _scatter(axes: Axes, points: Tensor, color: str, size: float = 2, alpha: float = 0.5) -> None:
    across, up = points.detach().float().cpu()[:5000].T
    axes.scatter(across, up, s=size, c=color, alpha=alpha, linewidths=0)


def _same_limits(panels: Sequence[Axes], points: Sequence[Tensor]) -> None:
    """The same square window for all panels, around all points."""
    reach = 1.08 * max(float(p.detach().abs().max()) for p in points)
    for axes in panels:
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach))


def _save(figure: Figure, path: str | Path) -> None:
    with writing(path) as draft:
        figure.savefig(draft, format=Path(path).suffix[1:])


def _save_array(picture: np.ndarray, path: str | Path) -> None:
    from matplotlib.image import imsave

    with writing(path) as draft:
        imsave(draft, picture, format=Path(path).suffix[1:])
