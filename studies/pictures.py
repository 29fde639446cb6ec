"""Pictures of u on toys whose exact map is known: the field, the one-step map, and its error, point by point.

Each toy is a mixture of many narrow Gaussians along its shape, so that the velocity v(z, t) has a closed form and
u(z, 0, 1) is known by integrating it (studies.mixture).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmf_fast import MeanFlowLoss, Optimizer, TimeSampler, sample
from mmf_fast.evaluation.distances import sliced_wasserstein
from mmf_fast.files import writing
from mmf_fast.models import MLP
from studies.mixture import Mixture
from studies.report import FIGURES
from studies.rows import Rows, Setting, compared, table
from studies.runner import Study, main
from studies.training import train

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS, BATCH, POINTS = 3000, 256, 4000
RESOLUTION = 61  # points of each axis of the map of errors
TIMES = (1.0, 0.6, 0.3)  # of the arrows
LAMBDAS = (0.0, 1.0)


def circles() -> tuple[np.ndarray, float]:
    angle = 2 * math.pi * np.arange(128) / 128
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.concatenate([ring, 0.5 * ring]), 0.05


def moons() -> tuple[np.ndarray, float]:
    angle = math.pi * (np.arange(128) + 0.5) / 128
    upper, lower = (np.cos(angle), np.sin(angle)), (1 - np.cos(angle), 0.5 - np.sin(angle))
    return np.concatenate([np.stack(upper, axis=1), np.stack(lower, axis=1)]), 0.05


def checkerboard() -> tuple[np.ndarray, float]:
    """Eight squares, each a grid of 6 x 6 Gaussians."""
    inside = np.stack(np.meshgrid(*[(np.arange(6) + 0.5) / 6] * 2), axis=-1).reshape(-1, 2)
    corners = [(i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0]
    return np.concatenate([inside + corner for corner in corners]), 0.08


def eight_gaussians() -> tuple[np.ndarray, float]:
    angle = math.pi / 4 * np.arange(8)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1), 0.1


TOYS = {"circles": circles, "moons": moons, "checkerboard": checkerboard, "eight_gaussians": eight_gaussians}
SETTINGS: tuple[dict[str, Any], ...] = tuple({"toy": toy, "lam": lam} for toy in TOYS for lam in LAMBDAS)


def toy(name: str, seed: int = 0) -> Mixture:
    """Centred, with a mean variance of 1 per coordinate, so that its Gaussians stay round."""
    centres, deviation = TOYS[name]()
    centres = centres - centres.mean(0)
    scale = math.sqrt(np.square(centres).mean() + deviation**2)
    weights = [1 / len(centres)] * len(centres)
    return Mixture(torch.from_numpy(centres / scale), weights, torch.full((2,), deviation / scale), seed)


@torch.no_grad()
def one_step(net: nn.Module, z: Tensor) -> Tensor:
    return sample(net, tuple(z.shape), noise=z.float()).double()


def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
    torch.manual_seed(seed)
    data = toy(setting["toy"], seed)
    loss_fn = MeanFlowLoss(
        MLP(dim=2, width=128, depth=3), times=TimeSampler(share=0.5), lam=setting["lam"], paired=True, p=0.0
    )
    steps, points = (20, 50) if quick else (STEPS, POINTS)
    net = train(
        loss_fn, data, steps=steps, batch=BATCH, seed=seed,
        optimizer=Optimizer(lr=1e-3, schedule="cosine", ema=0.99),
    )  # fmt: skip
    z = torch.randn(points, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    exact, found = data.flow(z, 1.0, 0.0, 100), one_step(net, z)
    reference, other = data.split("train")[0][:points], data.split("validation")[0][:points]
    if seed == 0 and setting["lam"] and not quick:  # the page shows these
        figure = picture(data, net, z, exact, found)
        with writing(FIGURES / f"{picture_name(setting)}") as draft:
            figure.savefig(draft, format="png", dpi=90, metadata={"Software": None})
    square = (found - exact).square().sum(1).sort(descending=True).values
    return {
        "error": float((square.mean() / 2).sqrt()),
        "median error": float(square.median().sqrt()),
        "share of the worst": float(square[: points // 20].sum() / square.sum()),
        "distance": sliced_wasserstein(found.float(), reference),
        "distance of the exact map": sliced_wasserstein(exact.float(), reference),
        "distance of fresh data": sliced_wasserstein(other, reference),
    }


def picture_name(setting: Setting) -> str:
    return f"pictures_{setting['toy']}_lambda_{setting['lam']:g}.png"


# ---- pictures --------------------------------------------------------------------------------------------------------


def picture(data: Mixture, net: nn.Module, z: Tensor, exact: Tensor, found: Tensor) -> Figure:
    """Above: the learned velocity at three times, and the error of the one-step map where noise falls. Below: the
    learned and the exact map as arrows, and the points that they lead to."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.2), layout="constrained")
    above, below = figure.subplots(2, 4, subplot_kw={"aspect": "equal", "xticks": [], "yticks": []})
    for axes, t in zip(above[:3], TIMES, strict=True):
        velocity_arrows(axes, data, net, t)
    error_map(figure, above[3], data, net)
    map_arrows(below[0], z, found, "one evaluation")
    map_arrows(below[1], z, exact, "the exact map")
    for axes, points, name in (
        (below[2], found, "points of one evaluation"),
        (below[3], exact, "points of the exact map"),
    ):
        axes.scatter(
            points[:, 0], points[:, 1], s=3, c="#C44E52" if points is found else "#4C72B0", alpha=0.6, linewidths=0
        )
        axes.set_title(name)
    for axes in (*above, *below):
        axes.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7))
    return figure


@torch.no_grad()
def velocity_arrows(axes: Axes, data: Mixture, net: nn.Module, t: float) -> None:
    """-u(z, t, t), the way sampling moves a point, where points are at that time; in grey the exact velocity."""
    generator = torch.Generator().manual_seed(0)
    x = data.split("train")[0][:2000]
    points = (1 - t) * x + t * torch.randn(x.shape, generator=generator)
    axis = torch.linspace(-2.5, 2.5, 19)
    mesh = torch.cartesian_prod(axis, axis)
    near = mesh[torch.cdist(mesh, points).min(dim=1).values < 0.25]
    time = torch.full((len(near),), t)
    axes.scatter(points[:, 0], points[:, 1], s=3, c="#DDDDDD", linewidths=0)
    for velocity, color in ((data.velocity(near.double(), t), "#8C8C8C"), (net(near, time, time), "#C44E52")):
        axes.quiver(*near.T, *-velocity.T, color=color, angles="xy", scale=30, width=0.006)
    axes.set_title(f"-v(z, {t:g}): learned, exact (grey)")


def error_map(figure: Figure, axes: Axes, data: Mixture, net: nn.Module) -> None:
    axis = torch.linspace(-2.7, 2.7, RESOLUTION, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    error = (one_step(net, z) - data.flow(z, 1.0, 0.0, 100)).norm(dim=1).reshape(RESOLUTION, RESOLUTION).T
    image = axes.imshow(
        error.clamp_min(1e-3).log10(), origin="lower", extent=(-2.7, 2.7, -2.7, 2.7), cmap="magma", vmin=-2.5, vmax=0
    )
    figure.colorbar(image, ax=axes, shrink=0.8, label="log10 of the error")
    axes.set_title("error of the one-step map at z")


def map_arrows(axes: Axes, z: Tensor, x: Tensor, title: str, count: int = 150) -> None:
    start, move = z[:count], (x - z)[:count]
    axes.quiver(*start.T, *move.T, color="#8C8C8C", angles="xy", scale_units="xy", scale=1, width=0.003)
    axes.scatter(x[:count, 0], x[:count, 1], s=5, c="#C44E52", linewidths=0)
    axes.set_title(title)


# ---- what the rows say -----------------------------------------------------------------------------------------------


def answer(rows: Rows) -> str:
    figures = (
        "error",
        "median error",
        "share of the worst",
        "distance",
        "distance of the exact map",
        "distance of fresh data",
    )
    lines = {
        f"{setting['toy']}, lambda {setting['lam']:g}": [rows.spread(figure, **setting) for figure in figures]
        for setting in SETTINGS
        if rows.where(**setting)
    }
    words = "; ".join(
        f"{name}: {compared(rows.spread('error', toy=name, lam=1.0), rows.spread('error', toy=name, lam=0.0))} lambda 0"
        for name in TOYS
    )
    shown = [
        f"![{setting['toy']}, lambda 1](results/{picture_name(setting)})"
        for setting in SETTINGS
        if setting["lam"] and rows.where(**setting)
    ]
    text = (
        f"Error of the one-step map at lambda 1 beside lambda 0: {words}. A twentieth of the points has most of the "
        "squared error: those where the exact map tears, as noise from either side of a line goes to different parts "
        "of the data, and a smooth network bridges the gap."
    )
    return "\n\n".join([text, table("toy", list(figures), lines), *shown])


def draw(rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for i, lam in enumerate(LAMBDAS):
        values = [rows.spread("error", toy=name, lam=lam) for name in TOYS]
        axes.bar(
            np.arange(len(TOYS)) + 0.4 * (i - 0.5), [each.mean for each in values], 0.38, capsize=3,
            yerr=np.nan_to_num([each.deviation for each in values]), label=f"lambda {lam:g}",
        )  # fmt: skip
    axes.set_xticks(range(len(TOYS)), list(TOYS))
    axes.set_ylabel("rms error of u(z, 0, 1)")
    axes.legend()
    return figure


STUDY = Study(
    name="pictures",
    title="Pictures of u",
    question="What does an average velocity look like, and where is it wrong?",
    settings=SETTINGS,
    run=run,
    seconds=lambda setting: 60,
    method=(
        "Circles, moons, a checkerboard and 8 Gaussians as mixtures of 8 to 288 Gaussians, so that the exact map from "
        f"noise to data is known by integrating a closed form. An MLP (width 128, 3 blocks), {STEPS:,} steps of "
        f"{BATCH}, Adam at 1e-3 with a cosine, half of the rows intervals, paired, p = 0. error: root mean square of "
        f"u(z, 0, 1) beside the exact one over {POINTS:,} points and both coordinates, in units in which the data have "
        "variance 1. distance: sliced 2-Wasserstein to as many data."
    ),
    draw=draw,
    answer=answer,
    doubt="A network that can tear (a deeper or wider one), longer training, another law of r and t.",
)

if __name__ == "__main__":
    main(STUDY)
