"""One figure beside a published one: 8 Gaussians to moons, with the network, data, iterations and metric of C2OT.

Ho Kei Cheng and Alexander Schwing, The Curse of Conditions (arXiv 2503.10636), publish squared 2-Wasserstein distances
of flow matching and of flow matching on minibatch optimal transport, without a condition, in the left part of their
figure 1. Data, network and training are written here from its repository (hkchengrex/C2OT, commit 26253f2: moons.py and
c2ot/utils/playground_utils.py) and from torchdyn 1.0.6, whose moons it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mmf_fast import Optimizer, sample
from mmf_fast.data.dataset import Batch, Identity, Split, SplitName
from studies.methods import FLOW_MATCHING, METHODS, loss_of, sampler_of, title
from studies.rows import Rows, Setting, Spread, compared, table
from studies.runner import Study, main
from studies.training import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Squared 2-Wasserstein distance, mean and deviation of ten runs: arXiv 2503.10636, figure 1, "unconditional".
PUBLISHED = {
    ("flow matching", "one step"): Spread(6.232, 0.186, 10),
    ("flow matching", "adaptive"): Spread(0.120, 0.045, 10),
    ("minibatch OT", "one step"): Spread(0.072, 0.025, 10),
    ("minibatch OT", "adaptive"): Spread(0.050, 0.040, 10),
}
STEPS, BATCH, POINTS = 20_000, 256, 10_000
POOL = 1024  # points that its loader makes at once and cuts into four batches


# ---- data ------------------------------------------------------------------------------------------------------------


def eight_gaussians(rng: np.random.Generator, count: int) -> np.ndarray:
    """The source (count, 2): on the circle of radius 5; the covariance, not the deviation, is sqrt(0.1)."""
    angle = rng.integers(8, size=count) * (math.pi / 4)
    noise = 0.1**0.25 * rng.standard_normal((count, 2))
    return (5 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + noise).astype(np.float32)


def moons(rng: np.random.Generator, count: int) -> np.ndarray:
    """The data (count, 2), in order along one half circle and then along the other: torchdyn's moons times 3, less 1.

    Its noise of 0.2 is uniform on [0, 0.2] and the same number for both coordinates.
    """
    outer = np.linspace(0, math.pi, count // 2)
    inner = np.linspace(0, math.pi, count - count // 2)
    x = np.concatenate([np.cos(outer), 1 - np.cos(inner)])
    y = np.concatenate([np.sin(outer), 0.5 - np.sin(inner)])
    points = np.stack([x, y], axis=1) + 0.2 * rng.uniform(size=(count, 1))
    return (3 * points - 1).astype(np.float32)


class EightGaussiansToMoons:
    """A dataset (`mmf_fast.data.Dataset`) of moons x, each with its noise. A pool of 1,024 makes four batches in the
    order in which its points are made: each is a quarter of the moons."""

    name, num_classes = "8 gaussians to moons", 0
    shape: tuple[int, ...] = (2,)
    identity: Identity = {}

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch(self, step: int, size: int, rank: int = 0, world_size: int = 1) -> Batch:
        number, part = divmod(step, POOL // size)
        rng, rows = np.random.default_rng((self.seed, number)), slice(part * size, (part + 1) * size)
        noise, x = (torch.from_numpy(draw(rng, POOL)[rows]) for draw in (eight_gaussians, moons))
        return x, {"noise": noise}

    def split(self, name: SplitName) -> Split:
        return torch.from_numpy(moons(np.random.default_rng(1 if name == "train" else 2), POINTS)), None


# ---- network ---------------------------------------------------------------------------------------------------------


class ResidualMLP(nn.Module):
    """Its network, with a second time: x + W_2 gelu(W_1 x) three times, of width 128 and 512, after linear embeddings
    of the point and of (t, t - r). Flow matching has r = t, so it sees the same network as there."""

    def __init__(self, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.point, self.times = nn.Linear(2, width), nn.Linear(2, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.output = nn.Linear(width, 2)

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        x = self.point(z) + self.times(torch.cat([t[:, None], (t - r)[:, None]], dim=1))
        for block in self.blocks:
            x = x + block(x)
        return self.output(x)


# ---- metric ----------------------------------------------------------------------------------------------------------


def squared_wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """W_2^2 of two sets of equal size: the mean squared length of the best assignment."""
    cost = torch.cdist(torch.from_numpy(x), torch.from_numpy(y)).square().numpy()
    return float(cost[linear_sum_assignment(cost)].mean())


@torch.no_grad()
def adaptive(net: nn.Module, noise: Tensor, tolerance: float = 1e-4, chunk: int = 256) -> tuple[Tensor, float]:
    """Samples by Dormand and Prince's method from t = 1 to 0, and its evaluations per chunk of points."""
    evaluations, samples = [], []

    def velocity(t: float, z: np.ndarray) -> np.ndarray:
        points = torch.from_numpy(z).float().reshape(-1, 2)
        time = torch.full((len(points),), t)
        return net(points, time, time).double().flatten().numpy()

    for points in noise.split(chunk):
        flat = points.double().flatten().numpy()
        solution = solve_ivp(velocity, (1.0, 0.0), flat, method="RK45", rtol=tolerance, atol=tolerance)
        samples.append(torch.from_numpy(solution.y[:, -1]).float().reshape(-1, 2))
        evaluations.append(solution.nfev)
    return torch.cat(samples), float(np.mean(evaluations))


# ---- the study -------------------------------------------------------------------------------------------------------


def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
    torch.manual_seed(seed)
    steps, points = (40, 200) if quick else (STEPS, POINTS)
    loss_fn = loss_of(setting, ResidualMLP())
    adam = Optimizer(lr=3e-4, betas=(0.9, 0.999), clip=0.0, warmup=0, ema=0.0)
    net = train(loss_fn, EightGaussiansToMoons(seed), steps=steps, batch=BATCH, seed=seed, optimizer=adam)

    rng = np.random.default_rng((1, seed))
    noise, x = torch.from_numpy(eight_gaussians(rng, points)), moons(rng, points)
    figures = {"fresh data": squared_wasserstein(x, moons(rng, points))}
    one = sample(net, (points, 2), noise=noise, sampler=sampler_of(setting))
    figures["one step"] = squared_wasserstein(x, one.numpy())
    if setting["method"] == "flow matching":
        drawn, figures["evaluations"] = adaptive(net, noise)
        figures["adaptive"] = squared_wasserstein(x, drawn.numpy())
    return figures


def answer(rows: Rows) -> str:
    def cells(setting: Setting) -> list[Any]:
        solver = setting == FLOW_MATCHING
        adaptive = [rows.spread(name, **setting) if solver else "" for name in ("adaptive", "evaluations")]
        return [rows.spread("one step", **setting), *adaptive]

    published = {
        f"{name}, published": [PUBLISHED[name, "one step"], PUBLISHED[name, "adaptive"], ""]
        for name in ("flow matching", "minibatch OT")
    }
    ours = {title(setting): cells(setting) for setting in METHODS if rows.where(**setting)}
    head = ["one step", "adaptive solver", "its evaluations"]
    flow, plain, full = (rows.spread("one step", **setting) for setting in METHODS)
    solved, coupled = rows.spread("adaptive", **FLOW_MATCHING), PUBLISHED["minibatch OT", "one step"]
    words = (
        f"One Euler step of flow matching: {flow:.3f} here, {PUBLISHED['flow matching', 'one step']:.3f} published; "
        f"adaptive: {solved:.3f} here, {PUBLISHED['flow matching', 'adaptive']:.3f} published. One evaluation of "
        f"mmf_fast: {plain:.3f} at lambda 0 and {full:.3f} at lambda 1, with the same network, data, iterations and "
        f"learning rate and without couplings; at lambda 1 that is {compared(full, flow)} one step of flow matching, "
        f"{compared(full, solved)} its adaptive solver, and {compared(full, coupled)} the published step on minibatch "
        f"optimal transport. Two draws of the moons themselves are {rows.spread('fresh data'):.3f} apart."
    )
    return "\n\n".join([words, table("squared 2-Wasserstein distance to the moons", head, published | ours)])


def draw(rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    bars: list[tuple[str, Spread, str]] = [
        (f"published:\n{name},\n{solver}", value, "#8C8C8C") for (name, solver), value in PUBLISHED.items()
    ]
    for setting in METHODS:
        for solver, color in (("one step", "#C44E52"), ("adaptive", "#4C72B0")):
            found = Rows(row for row in rows.where(**setting) if solver in row["figures"])
            if found:
                name = f"{title(setting)},\n{solver}"
                bars.append((name, found.spread(solver), color))
    names, values, colors = zip(*bars, strict=True)
    axes.bar(range(len(bars)), [value.mean for value in values], color=colors,
             yerr=np.nan_to_num([value.deviation for value in values]), capsize=3)  # fmt: skip
    axes.set(yscale="log", ylabel="squared 2-Wasserstein distance")
    axes.set_xticks(range(len(bars)), names, rotation=90, fontsize=7)
    return figure


STUDY = Study(
    name="c2ot",
    title="Beside a published figure: 8 Gaussians to moons",
    question="What does one evaluation of mmf_fast reach where C2OT publishes flow matching, all else equal?",
    settings=METHODS,
    run=run,
    rehearsal=METHODS,
    seconds=lambda setting: 500,
    method=(
        "Figure 1 of arXiv 2503.10636 (C2OT) gives 2-Wasserstein distances for 8 Gaussians to moons without "
        "conditions, mean and deviation of ten runs. Its code (hkchengrex/C2OT, 26253f2) prints the optimal cost of "
        "squared distances of 10,000 pairs and takes no root, so the figures are squares. From there: a residual MLP "
        f"of width 128, three blocks, {STEPS:,} iterations of {BATCH}, Adam at 3e-4, batches that are quarters of a "
        f"pool of {POOL:,} moons in the order in which they are made, dopri5 with tolerance 1e-4 in chunks of 256. Not "
        "the same: scipy's solver and assignment in place of torchdyn's and POT's, our random numbers, three runs in "
        "place of ten. mmf_fast is the same network with t - r as a second number beside t (128 weights more), half of "
        "the rows intervals, p = 0, the 8 Gaussians as `noise=`, and the same data, iterations and learning rate."
    ),
    draw=draw,
    answer=answer,
    doubt=(
        "More iterations, or a network with a better embedding of the times: a linear one is the published network's, "
        "not one that average velocities would choose. Minibatch optimal transport is quoted, not run again."
    ),
)

if __name__ == "__main__":
    main(STUDY)
