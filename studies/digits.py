"""Lambda and the weight on real images: the 8x8 digits, and what makes lambda = 1 better or worse there.

python -m studies.digits [--list | --quick | --minutes M]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mmf_fast import MeanFlowLoss, Optimizer, TimeSampler
from mmf_fast.data import load
from mmf_fast.evaluation import evaluate
from mmf_fast.models import DiT
from mmf_fast.training.engines import StepResult
from studies.noise import signal_to_noise
from studies.rows import Rows, Setting, Spread, cheapest, compared, table
from studies.runner import Study, main
from studies.training import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, DEPTH = 1000, 2
EVALUATIONS = (1, 2, 4)
WEIGHTS: dict[str, dict[str, Any]] = {
    "p = 0": {"p": 0.0},
    "p = 0.5": {"p": 0.5},
    "p = 1": {"p": 1.0},
    "by times": {"p": 1.0, "weight": "times"},
}
BASE: dict[str, Any] = {
    **{"weight": "p = 0", "steps": STEPS, "batch": 128, "rate": 1e-3, "clip": 1.0, "schedule": "constant"},
    **{"width": 96, "start": 0.0},
}
GRID = [{**BASE, "weight": weight, "lam": lam} for weight in WEIGHTS for lam in (0.0, 1.0, 0.1)]
CHANGES: list[dict[str, Any]] = [
    {"rate": 3e-4},
    {"rate": 3e-3},
    {"batch": 512},
    {"clip": 0.0},
    {"schedule": "cosine"},
    {"steps": 4 * STEPS},
    {"width": 32},
    {"width": 192},
    {"start": 0.5},  # of the steps, before which no row is an interval
]
SETTINGS = [*GRID, *({**BASE, **change, "lam": lam} for change in CHANGES for lam in (0.0, 1.0))]


def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
    steps = 6 if quick else setting["steps"]
    torch.manual_seed(seed)
    data = load("digits", seed=seed)
    net = DiT(8, channels=1, patch_size=4, width=setting["width"], depth=DEPTH, heads=4, num_classes=10)
    times = TimeSampler(share=0.25, start=round(setting["start"] * steps))
    loss_fn = MeanFlowLoss(net, times=times, lam=setting["lam"], paired=True, **WEIGHTS[setting["weight"]])
    figures: dict[str, float] = {}

    def watch(step: int, result: StepResult) -> None:
        if step + 1 == max(1, steps // 4):
            for lam in (0.0, 1.0):
                other = MeanFlowLoss(net, times=replace(times, start=0), lam=lam, paired=True, p=0.0)
                figures[f"signal_{lam:g}"] = signal_to_noise(other, data, setting["batch"], 3 if quick else 16)

    averaged = train(
        loss_fn, data, steps=steps, batch=setting["batch"], seed=seed, watch=watch,
        optimizer=Optimizer(lr=setting["rate"], clip=setting["clip"], schedule=setting["schedule"], ema=0.995),
    )  # fmt: skip
    found = evaluate(averaged, data, EVALUATIONS)["figures"]
    for name in ("1", "2", "4"):
        figures[f"frechet_{name}"] = found["frechet_distance"][name]
    return figures | {
        "frechet_real": found["frechet_distance"]["validation"],
        "agreement": found["class_agreement"]["1"],
    }


# ---- what the rows say -----------------------------------------------------------------------------------------------


def answer(rows: Rows) -> str:
    def distance(lam: float, evaluations: int = 1, **others: Any) -> Spread:
        return rows.spread(f"frechet_{evaluations}", **{**BASE, **others, "lam": lam})

    def ratio(change: Mapping[str, Any]) -> Spread:
        case = {**BASE, **change}
        return rows.ratio("frechet_1", {**case, "lam": 1.0}, {**case, "lam": 0.0})

    def named(change: Mapping[str, Any]) -> str:
        return ", ".join(f"{key} {value}" for key, value in change.items()) or "base"

    zero, one = distance(0.0), distance(1.0)
    signal = [rows.spread(f"signal_{lam}", **BASE, lam=0.0) for lam in (0, 1)]
    return "\n\n".join(
        [
            f"Real digits of the validation split have {rows.spread('frechet_real'):.2f}. With p = 0 in one step "
            f"lambda 1 ({one:.2f}) is {compared(one, zero)} lambda 0 ({zero:.2f}). The signal of a batch's gradient "
            f"(norm of its mean over its deviation) after a quarter of the steps is {signal[0]:.3f} with lambda 0 and "
            f"{signal[1]:.3f} with lambda 1, at the same weights.",
            table(
                "weight; Frechet distance in 1 / 2 / 4 steps", [f"lambda {lam:g}" for lam in (0.0, 0.1, 1.0)],
                {weight: [" / ".join(f"{distance(lam, steps, weight=weight):.2f}" for steps in EVALUATIONS)
                          for lam in (0.0, 0.1, 1.0)] for weight in WEIGHTS},
            ),
            table(
                "one step, p = 0, with", ["lambda 0", "lambda 1", "lambda 1 over 0"],
                {named(change): [distance(0.0, **change), distance(1.0, **change), ratio(change)]
                 for change in ({}, *CHANGES)}, ".2f",
            ),
        ]
    )  # fmt: skip


def recommend(rows: Rows) -> str:
    grid = {
        (lam, weight): rows.spread("frechet_1", **{**BASE, "weight": weight, "lam": lam})
        for lam in (0.0, 0.1, 1.0)
        for weight in ("p = 0", "by times", "p = 0.5", "p = 1")
    }
    if (chosen := cheapest(grid)) is None:
        return ""
    theirs = grid[0.0, "p = 1"]
    return (
        f"on the digits lambda {chosen[0]:g} with {chosen[1]} (Frechet distance {grid[chosen]:.2f}; {theirs:.2f} with "
        "lambda 0 and p = 1)"
    )


def draw(rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for number, weight in enumerate(WEIGHTS):
        found = [rows.spread("frechet_1", **{**BASE, "weight": weight, "lam": lam}) for lam in (0.0, 0.1, 1.0)]
        places = [place + 0.1 * (number - 1.5) for place in range(3)]
        bars = [each.deviation for each in found]
        axes.errorbar(places, [each.mean for each in found], bars, fmt="o", capsize=3, label=weight, color=f"C{number}")
    axes.axhline(rows.spread("frechet_real").mean, color="black", linewidth=1, label="real digits")
    axes.set_xticks(range(3), ["0", "0.1", "1"])
    axes.set(xlabel="lambda", ylabel="Frechet distance in one step", ylim=(0, None))
    axes.legend(title="weight")
    return figure


STUDY = Study(
    name="digits",
    title="Lambda and the weight on images",
    question="Which lambda and weight draw the best 8x8 digits at equal steps, and what changes that?",
    settings=SETTINGS,
    run=run,
    seconds=lambda setting: 20.0 * setting["steps"] / STEPS * setting["batch"] / BASE["batch"] * setting["width"] / 96,
    method=f"The 8x8 digits with a DiT of width {BASE['width']} and {DEPTH} blocks of 4 tokens, {STEPS:,} steps of "
    f"{BASE['batch']}, a quarter of the rows with r < t (r uniform), paired, Adam at {BASE['rate']:g}, gradients "
    f"clipped to {BASE['clip']:g}, weights averaged. Frechet distance in the features of a classifier of the training "
    f"split, of samples in one, two and four steps, to the training split. Left out of the full grid, for their cost: "
    f"the curves of lambda, the lambdas between, and the recipe's larger network. start: the share of the steps before "
    f"which no row is an interval.",
    recommend=recommend,
    rehearsal=[{**BASE, "weight": "by times", "lam": 1.0}],
    draw=draw,
    answer=answer,
    doubt="The recipe's larger network, and more pixels.",
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
