"""Which lambda, which weight, which warm-up: three Gaussians in the plane, where u(z, 0, 1) is known.

python -m studies.curriculum [--list | --quick | --minutes M]
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmf_fast import LambdaSchedule, MeanFlowLoss, Optimizer, TimeSampler
from mmf_fast.models import MLP
from mmf_fast.training.engines import StepResult, build_engine
from studies.mixture import one_step_error, three_gaussians
from studies.rows import Rows, Setting, Spread, cheapest, compared, table
from studies.runner import Study, main
from studies.training import sgd_engine, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, BATCH, WIDTH, DEPTH, RATE = 1000, 256, 64, 3, 1e-3
LAMBDAS = (0.0, 0.05, 0.1, 0.3, 0.5, 1.0, "linear", "cosine", "step")
CURVES = ("linear", "cosine", "step")  # from 0 to 1, over the first half of the steps, or at its end
WEIGHTS: dict[str, dict[str, Any]] = {
    "p = 0": {"p": 0.0},
    "p = 0.5": {"p": 0.5},
    "p = 1": {"p": 1.0},
    "by times": {"p": 1.0, "weight": "times"},
}
ORDER = ("p = 0", "by times", "p = 0.5", "p = 1")  # of equally cheap ones
BEST = ("p = 0", "by times")  # the weights that the variations are made with
LENGTHS: dict[str, Callable[[Tensor], Tensor]] = {  # lambda of an interval from its length s = t - r
    "s": lambda s: s,
    "1 - s": lambda s: 1 - s,
    "1 / (1 + 25 s^2)": lambda s: 1 / (1 + 25 * s.square()),
}
STARTS = (0.25, 0.5)  # of the steps, before which no row is an interval
BASE = {"warmup": 0.5, "optimizer": "adam", "rate": RATE, "tangent": "paired", "clip": 0.0, "start": 0.0}
RATES = {"adam": (3e-4, RATE, 3e-3, 1e-2, 3e-2), "sgd": (1e-2, 3e-2, 0.1, 0.3)}


def setting(lam: float | str, weight: str, **others: Any) -> dict[str, Any]:
    return {"lam": lam, "weight": weight, **BASE, **others}


CORNERS = [
    setting(*pair) for pair in ((0.0, "p = 1"), (0.0, "by times"), (0.0, "p = 0"), (1.0, "p = 0"), (1.0, "by times"))
]
GRID = [setting(lam, weight) for weight, lam in itertools.product(WEIGHTS, LAMBDAS)]
VARIATIONS = [
    *(setting("linear", "p = 0", warmup=share) for share in (0.1, 0.25, 1.0)),
    *(setting(lam, "p = 0", tangent=kind) for kind in ("predicted", "conditional") for lam in (0.0, 0.3, 1.0)),
    *(
        setting(lam, "p = 0", optimizer=name, rate=rate)
        for name, rates in RATES.items()
        for rate in rates
        for lam in (0.0, 0.1, 1.0)
        if (name, rate) != ("adam", RATE)
    ),
    *(setting(lam, weight, clip=1.0) for weight in BEST for lam in (0.0, 1.0)),
    *(setting(lam, weight) for weight in BEST for lam in LENGTHS),
    *(setting(lam, "p = 0", start=share) for share in STARTS for lam in (0.0, 0.3, 1.0)),
]


class ByLength(MeanFlowLoss):
    """Each interval takes the share lambda(t - r) of the gradient through du/dt. An option of the loss once it wins."""

    def __init__(self, net: nn.Module, of_length: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__(net, lam=1.0, **options)
        self.of_length = of_length

    def _average(self, points: Any, w: Tensor, tangent_grad: bool) -> tuple[Any, Any]:
        u, du = super()._average(points, w, tangent_grad)
        share = self.of_length(points.t - points.r)[:, None]
        return u, share * du + (1 - share) * du.detach()


def schedule(lam: float | str, warmup: float, steps: int) -> LambdaSchedule:
    """A constant, or a curve from 0 to 1 over a share of the steps."""
    length = max(1, round(warmup * steps))
    if lam == "step":
        return LambdaSchedule(kind="step", start=length)
    return LambdaSchedule(value=float(lam)) if lam not in CURVES else LambdaSchedule(kind=str(lam), warmup=length)


def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
    steps = 20 if quick else STEPS
    torch.manual_seed(seed)
    data = three_gaussians(seed=seed)
    warnings.filterwarnings("ignore", "conditional tangents")  # they are here to show it
    net = MLP(dim=2, width=WIDTH, depth=DEPTH)
    options: dict[str, Any] = {
        "times": TimeSampler(share=0.5, start=round(setting["start"] * steps)),
        "tangent": "conditional" if setting["tangent"] == "conditional" else "predicted",
        "paired": setting["tangent"] == "paired",
        **WEIGHTS[setting["weight"]],
    }
    if setting["lam"] in LENGTHS:
        loss_fn: MeanFlowLoss = ByLength(net, LENGTHS[setting["lam"]], **options)
    else:
        loss_fn = MeanFlowLoss(net, lam=schedule(setting["lam"], setting["warmup"], steps), **options)
    squares: list[float] = []  # of the last quarter

    def watch(step: int, result: StepResult) -> None:
        if step >= 3 * steps // 4:
            squares.append(float(result.metrics["mse_interval"]))

    averaged = train(
        loss_fn, data, steps=steps, batch=BATCH, seed=seed, watch=watch,
        optimizer=Optimizer(lr=setting["rate"], clip=setting["clip"], ema=0.995),
        make_engine=sgd_engine if setting["optimizer"] == "sgd" else build_engine,
    )  # fmt: skip
    found = torch.tensor(squares, dtype=torch.float64)  # infinite, perhaps, where a run diverges: statistics refuses it
    return {
        "error": one_step_error(averaged, data),
        "error_without_average": one_step_error(net, data),
        "loss_deviation": float(found.std() / found.mean()),
    }


# ---- what the rows say -----------------------------------------------------------------------------------------------


def answer(rows: Rows) -> str:
    def error(lam: float | str, weight: str, figure: str = "error", **others: Any) -> Spread:
        return rows.spread(figure, **setting(lam, weight, **others))

    grid = {(lam, weight): error(lam, weight) for weight in WEIGHTS for lam in LAMBDAS}
    known = {key: value for key, value in grid.items() if value.seeds}
    (lam, weight), best = min(
        known.items(), key=lambda item: item[1].mean, default=((0.0, "p = 0"), grid[0.0, "p = 0"])
    )
    lengths = [spread for lam, weight in itertools.product(LENGTHS, BEST) if (spread := error(lam, weight)).seeds > 1]
    by_length = ""
    if lengths:
        least = min(lengths, key=lambda spread: spread.mean)
        by_length = (
            f" A lambda of its own for each interval, by its length, has at best {least:.3f}, {compared(least, best)} "
            "that least error."
        )
    first, without = (error(0.0, "p = 0", start=share) for share in (STARTS[0], 0.0))
    flow_first = (
        f" With flow matching alone in the first {STARTS[0]:.0%} of the steps, that of lambda 0 is {first:.3f}, "
        f"{compared(first, without)} without, and {compared(first, best)} that least error."
        if first.seeds > 1
        else ""
    )
    parts = [
        f"The least error is {best:.3f}, with lambda {lam} and the weight {weight}; with MeanFlow's own setting "
        f"(lambda 0, p = 1) it is {grid[0.0, 'p = 1']:.3f}. At lambda 0 the weights have "
        + ", ".join(f"{grid[0.0, weight]:.3f} ({weight})" for weight in WEIGHTS if grid[0.0, weight].seeds)
        + f". By times it is {compared(grid[0.0, 'by times'], grid[0.0, 'p = 0'])} with p = 0, and "
        f"{compared(grid[0.0, 'by times'], grid[0.0, 'p = 1'])} with p = 1." + "".join(
            f" With the weight {weight} the error of the full gradient (lambda 1), {grid[1.0, weight]:.3f}, is "
            f"{compared(grid[1.0, weight], grid[0.0, weight])} that of lambda 0."
            for weight in WEIGHTS if grid[1.0, weight].seeds > 1
        ) + by_length + flow_first,
        table("lambda", list(WEIGHTS), {str(lam): [grid[lam, weight] for weight in WEIGHTS] for lam in LAMBDAS}),
        table(
            "curve, p = 0: share of the steps to lambda 1", ["0.1", "0.25", "0.5", "1"],
            {"linear": [error("linear", "p = 0", warmup=share) for share in (0.1, 0.25, 0.5, 1.0)]},
        ),
        table(
            "lambda of an interval from its length s = t - r", list(BEST),
            {lam: [error(lam, weight) for weight in BEST] for lam in LENGTHS},
        ),
        table(
            "tangents, p = 0", ["lambda 0", "lambda 0.3", "lambda 1"],
            {kind: [error(lam, "p = 0", tangent=kind) for lam in (0.0, 0.3, 1.0)]
             for kind in ("paired", "predicted", "conditional")},
        ),
        table(
            "flow matching first, p = 0", ["lambda 0", "lambda 0.3", "lambda 1"],
            {f"in {share:g} of the steps": [error(lam, "p = 0", start=share) for lam in (0.0, 0.3, 1.0)]
             for share in (0.0, *STARTS)},
        ),
        table(
            "learning rate, p = 0", ["lambda 0", "lambda 0.1", "lambda 1"],
            {f"{name} {rate:g}": [error(lam, "p = 0", optimizer=name, rate=rate) for lam in (0.0, 0.1, 1.0)]
             for name, rates in RATES.items() for rate in rates},
        ),
        table(
            "other", ["lambda 0", "lambda 1"],
            {
                **{f"{weight}, gradient clipped to 1": [error(lam, weight, clip=1.0) for lam in (0.0, 1.0)]
                   for weight in BEST},
                **{f"{weight}, no moving average":
                   [error(lam, weight, "error_without_average") for lam in (0.0, 1.0)] for weight in WEIGHTS},
                **{f"{weight}, deviation of the intervals' squared error over steps, of its mean":
                   [error(lam, weight, "loss_deviation") for lam in (0.0, 1.0)] for weight in WEIGHTS},
            },
        ),
    ]  # fmt: skip
    return "\n\n".join(filter(None, parts))


def recommend(rows: Rows) -> str:
    lams = (*(lam for lam in LAMBDAS if lam not in CURVES), *CURVES)
    grid = {(lam, weight): rows.spread("error", **setting(lam, weight)) for lam in lams for weight in ORDER}
    if (chosen := cheapest(grid)) is None:
        return ""
    theirs = grid[0.0, "p = 1"]
    return (
        f"in the plane, where u is known, lambda {chosen[0]} with the weight {chosen[1]} is the cheapest that nothing "
        f"beats beyond the error bars (error {grid[chosen]:.3f}; {theirs:.3f} with lambda 0 and p = 1)"
    )


def draw(rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for number, weight in enumerate(WEIGHTS):
        found = [rows.spread("error", **setting(lam, weight)) for lam in LAMBDAS]
        places = [place + 0.1 * (number - 1.5) for place in range(len(LAMBDAS))]
        means, bars = [each.mean for each in found], [each.deviation for each in found]
        axes.errorbar(places, means, bars, fmt="o", capsize=3, label=weight, color=f"C{number}")
    axes.set_xticks(range(len(LAMBDAS)), [str(lam) for lam in LAMBDAS])
    axes.set(xlabel="lambda", ylabel="error of u(z, 0, 1)", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=len(WEIGHTS), title="weight")
    return figure


STUDY = Study(
    name="curriculum",
    title="Lambda, its curriculum and the weight, in the plane",
    question="Which lambda, curriculum, warm-up and weight come nearest to the exact average velocity at equal steps?",
    settings=[*CORNERS, *(each for each in GRID if each not in CORNERS), *VARIATIONS],
    run=run,
    seconds=lambda setting: 12.0,
    method=f"Three Gaussians in the plane (weights 0.5, 0.3, 0.2, deviation 0.3, centres 1.5 from the origin), where "
    f"u(z, 0, 1) is integrated from the closed form of v(z, t) by Runge-Kutta. MLP of width {WIDTH} and depth {DEPTH}, "
    f"{STEPS:,} steps of {BATCH}, half of the rows with r < t, Adam at {RATE:g} with {Optimizer().warmup} steps of "
    f"warm-up, paired tangents, weights averaged. The error is the root mean square over points and coordinates. "
    f"Curves of lambda rise to 1 over half of the steps (linear, cosine) or jump there (step). One factor is varied "
    f"at a time.",
    draw=draw,
    answer=answer,
    doubt="A network that is small for its data, many more steps, or another share of rows with r < t.",
    recommend=recommend,
    rehearsal=(setting(0.0, "by times"), setting(1.0, "p = 0", optimizer="sgd", rate=1e-2)),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
