"""Why the full gradient halves the error in the plane and not on images: mixtures that differ in one thing at a time.

python -m studies.reasons [--list | --quick | --minutes M]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from mmf_fast import MeanFlowLoss, Optimizer, TimeSampler
from mmf_fast.models import MLP, layers
from mmf_fast.training.engines import StepResult, build_engine
from studies.mixture import one_step_error, three_gaussians
from studies.noise import signal_to_noise
from studies.rows import Rows, Setting, Spread, table
from studies.runner import Study, main
from studies.training import SGDEngine, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, WIDTH, DEPTH = 1000, 64, 3
LOOKS = (60, 125, 250, 500, 1000)  # steps after which the error is measured
LAMBDAS = (0.0, 1.0, 0.1)
BASE = {"dim": 2, "outside": 0.3, "count": None, "batch": 256, "rate": 1e-3, "frequency": 2.0, "optimizer": "adam"}
HIGH = {**BASE, "dim": 64}
FACTORS: dict[str, list[dict[str, Any]]] = {
    "dimension, noise in all of them": [{**BASE, "dim": dim} for dim in (2, 64, 8, 32)],
    "thin outside of a plane of 64": [{**HIGH, "outside": 0.03}],
    "batch, in 64 dimensions": [{**HIGH, "batch": size} for size in (64, 1024)],
    "learning rate, in 64 dimensions": [{**HIGH, "rate": rate} for rate in (3e-4, 3e-3)],
    "points of data, in 64 dimensions": [{**HIGH, "count": count} for count in (100, 1797)],
    "highest frequency of the times, in 64 dimensions": [{**HIGH, "frequency": 16.0}],
    "SGD, in 64 dimensions": [{**HIGH, "optimizer": "sgd", "rate": 0.1}],
}
CASES = [case for cases in FACTORS.values() for case in cases]


def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
    steps, batches, batch = 16 if quick else STEPS, 3 if quick else 24, setting["batch"]
    torch.manual_seed(seed)
    data = three_gaussians(setting["dim"], setting["outside"], seed=seed, count=setting["count"])
    loss_fn = MeanFlowLoss(
        MLP(dim=setting["dim"], width=WIDTH, depth=DEPTH),
        times=TimeSampler(share=0.5), lam=setting["lam"], paired=True, p=0.0,
    )  # fmt: skip
    average: list[torch.nn.Module] = []
    figures: dict[str, float] = {}

    def watch(step: int, result: StepResult) -> None:
        for look in LOOKS:
            if step + 1 == max(1, look * steps // STEPS):
                figures[f"error_{look}"] = one_step_error(average[0], data)
                figures[f"plane_{look}"] = one_step_error(average[0], data, coordinates=slice(0, 2))
                if look in (250, STEPS):
                    for lam in (0.0, 1.0):
                        other = MeanFlowLoss(loss_fn.net, times=loss_fn.times, lam=lam, paired=True, p=0.0)
                        figures[f"signal_{lam:g}_{look}"] = signal_to_noise(other, data, batch, batches)

    def make_engine(*arguments: Any) -> Any:
        engine = (SGDEngine if setting["optimizer"] == "sgd" else build_engine)(*arguments)
        average.append(engine.averaged())  # it follows the training
        return engine

    before, layers.MAX_FREQUENCY = layers.MAX_FREQUENCY, setting["frequency"]
    try:
        train(
            loss_fn, data, steps=steps, batch=batch, seed=seed, watch=watch, make_engine=make_engine,
            optimizer=Optimizer(lr=setting["rate"], clip=0.0, ema=0.995),
        )  # fmt: skip
    finally:
        layers.MAX_FREQUENCY = before
    return figures


# ---- what the rows say -----------------------------------------------------------------------------------------------


def ratio(rows: Rows, case: Setting, look: int = LOOKS[-1], figure: str = "error") -> Spread:
    """The error with lambda 1 over that with lambda 0, seed by seed."""
    return rows.ratio(f"{figure}_{look}", {**case, "lam": 1.0}, {**case, "lam": 0.0})


def named(case: Setting, base: Setting) -> str:
    """What is special about a case."""
    return ", ".join(f"{key} {value}" for key, value in case.items() if value != base[key]) or "base"


def answer(rows: Rows) -> str:
    lines = {}
    for case in CASES:
        found = {lam: rows.spread(f"error_{LOOKS[-1]}", **case, lam=lam) for lam in LAMBDAS}
        signal = [rows.spread(f"signal_{lam:g}_250", **case, lam=0.0) for lam in (0.0, 1.0)]
        lines[named(case, BASE)] = [*found.values(), ratio(rows, case), ratio(rows, case, figure="plane"), *signal]
    columns = [
        *(f"error, lambda {lam:g}" for lam in LAMBDAS),
        "lambda 1 over 0",
        "in the plane",
        "signal, lambda 0",
        "signal, lambda 1",
    ]
    curve = {
        named(case, BASE): [ratio(rows, case, look) for look in LOOKS]
        for case in (BASE, *({**BASE, "dim": dim} for dim in (8, 32, 64)))
    }
    helps = [named(case, BASE) for case in CASES if ratio(rows, case).below(Spread(1.0, 0.0, 9))]
    hurts = [named(case, BASE) for case in CASES if Spread(1.0, 0.0, 9).below(ratio(rows, case))]
    return "\n\n".join(
        [
            f"Beyond the error bars lambda 1 is better than lambda 0 in: {'; '.join(helps) or 'no case'}. It is worse "
            f"in: {'; '.join(hurts) or 'no case'}. The signal is the norm of the mean gradient over the deviation of a "
            "batch's gradient, after 250 steps with lambda 0, at the same weights for both.",
            table("case", columns, lines),
            table("error with lambda 1 over that with lambda 0, after steps", list(map(str, LOOKS)), curve, ".2f"),
        ]
    )


def draw(rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    found = [ratio(rows, case) for case in CASES]
    places = range(len(CASES))
    bars = [each.deviation if each.seeds > 1 else 0.0 for each in found]
    axes.errorbar([each.mean for each in found], places, xerr=bars, fmt="o", capsize=3)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(places, [named(case, BASE) for case in CASES])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="error with lambda 1 over that with lambda 0")
    return figure


STUDY = Study(
    name="reasons",
    title="What decides whether the full gradient helps",
    question="Why does lambda = 1 halve the error in the plane and double it on images?",
    settings=[{**case, "lam": lam} for lams in (LAMBDAS[:2], LAMBDAS[2:]) for case in CASES for lam in lams],
    run=run,
    seconds=lambda setting: 14.0 * max(1.0, setting["batch"] / 256),
    method=f"The three Gaussians of the chapter before, in more dimensions: their deviation there is that in the "
    f"plane, or a tenth of it (outside). MLP of width {WIDTH} and depth {DEPTH}, {STEPS:,} steps of "
    f"{BASE['batch']}, half of "
    f"the rows with r < t, p = 0, paired, Adam at {BASE['rate']:g}, weights averaged. One factor is varied at a time.",
    draw=draw,
    answer=answer,
    doubt="A network whose derivative in z is much larger, as that of a deep transformer may be.",
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
