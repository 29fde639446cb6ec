"""Why the full gradient halves the error in the plane and not on images: mixtures that differ in one thing at a time.

python -m studies.reasons [--list | --quick | --minutes M]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmf_fast import MeanFlowLoss, Optimizer, TimeSampler
from mmf_fast.models import MLP
from mmf_fast.models.layers import FREQUENCIES, Conditioning, sinusoids
from mmf_fast.training.engines import StepResult, build_engine
from studies.mixture import one_step_error, three_gaussians
from studies.noise import signal_to_noise
from studies.rows import Rows, Setting, Spread, compared, table
from studies.runner import Study, main
from studies.training import sgd_engine, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, WIDTH, DEPTH = 1000, 64, 3
LOOKS = (60, 125, 250, 500, 1000)  # steps after which the error is measured
LAMBDAS = (0.0, 1.0, 0.1)
BASE = {
    "dim": 2, "outside": 0.3, "count": None, "batch": 256, "rate": 1e-3, "schedule": "constant", "frequency": 2.0,
    "optimizer": "adam",
}  # fmt: skip
HIGH = {**BASE, "dim": 16}
SLOW, DECAYS = {**BASE, "rate": 3e-4}, {**BASE, "schedule": "cosine"}
FACTORS: list[dict[str, Any]] = [
    BASE,
    SLOW,
    DECAYS,
    HIGH,
    {**BASE, "batch": 64},
    {**BASE, "frequency": 16.0},
    {**HIGH, "outside": 0.03},
    {**HIGH, "rate": 3e-4},
    {**HIGH, "schedule": "cosine"},
    {**HIGH, "batch": 1024},
    {**HIGH, "count": 100},
    {**HIGH, "count": 1797},
    {**BASE, "optimizer": "sgd", "rate": 0.1},
    {**BASE, "dim": 8},
    {**BASE, "dim": 64},
]


class Times(nn.Module):
    """What an MLP without labels is conditioned on, by the same layers, but with frequencies of the times up to
    `highest`: networks have no such option, as 2 is better than more."""

    def __init__(self, own: Conditioning, highest: float) -> None:
        super().__init__()
        self.fc_in, self.fc_out, self.highest = own.fc_in, own.fc_out, highest

    def forward(self, r: Tensor, t: Tensor, y: None = None, context: None = None) -> Tensor:
        times_B4F = torch.cat([sinusoids(time, FREQUENCIES, self.highest) for time in (t, t - r)], dim=-1)
        return F.silu(self.fc_out(F.silu(self.fc_in(times_B4F))))


def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
    steps, batches, batch = 16 if quick else STEPS, 3 if quick else 24, setting["batch"]
    torch.manual_seed(seed)
    data = three_gaussians(setting["dim"], setting["outside"], seed=seed, count=setting["count"])
    net = MLP(dim=setting["dim"], width=WIDTH, depth=DEPTH)
    net.add_module("conditioning", Times(net.conditioning, setting["frequency"]))
    loss_fn = MeanFlowLoss(net, times=TimeSampler(share=0.5), lam=setting["lam"], paired=True, p=0.0)
    average: list[nn.Module] = []
    figures: dict[str, float] = {}

    def watch(step: int, result: StepResult) -> None:
        for look in LOOKS:
            if step + 1 == max(1, look * steps // STEPS):
                figures[f"error_{look}"] = one_step_error(average[0], data)
                figures[f"plane_{look}"] = one_step_error(average[0], data, coordinates=slice(0, 2))
                if look == 250:
                    for lam in (0.0, 1.0):
                        other = MeanFlowLoss(loss_fn.net, times=loss_fn.times, lam=lam, paired=True, p=0.0)
                        figures[f"signal_{lam:g}_{look}"] = signal_to_noise(other, data, batch, batches)

    def make_engine(*arguments: Any) -> Any:
        engine = (sgd_engine if setting["optimizer"] == "sgd" else build_engine)(*arguments)
        average.append(engine.averaged())  # it follows the training
        return engine

    train(
        loss_fn, data, steps=steps, batch=batch, seed=seed, watch=watch, make_engine=make_engine,
        optimizer=Optimizer(lr=setting["rate"], schedule=setting["schedule"], clip=0.0, ema=0.995),
    )  # fmt: skip
    return figures


# ---- what the rows say -----------------------------------------------------------------------------------------------


def ratio(rows: Rows, case: Setting, look: int = LOOKS[-1], figure: str = "error") -> Spread:
    """The error with lambda 1 over that with lambda 0, seed by seed."""
    return rows.ratio(f"{figure}_{look}", {**case, "lam": 1.0}, {**case, "lam": 0.0})


def named(case: Setting, base: Setting) -> str:
    """What is special about a case."""
    return ", ".join(f"{key} {value}" for key, value in case.items() if value != base[key]) or "the plane, base"


def answer(rows: Rows) -> str:
    lines = {}
    for case in FACTORS:
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
    curve = {named(case, BASE): [ratio(rows, case, look) for look in LOOKS] for case in FACTORS}
    return "\n\n".join(
        [
            _rates(rows) + _dimensions(rows),
            f"Beyond the error bars lambda 1 is better than lambda 0 in: {_cases(rows, better=True)}. It is worse in: "
            f"{_cases(rows, better=False)}. The signal is the norm of the mean gradient over the deviation of a "
            "batch's gradient, after 250 steps with lambda 0, at the same weights for both lambdas.",
            table("case", columns, lines),
            table("error with lambda 1 over that with lambda 0, after steps", list(map(str, LOOKS)), curve, ".2f"),
        ]
    )


def _cases(rows: Rows, better: bool) -> str:
    equal = Spread(1.0, 0.0, 9)
    found = {named(case, BASE): each for case in FACTORS if math.isfinite((each := ratio(rows, case)).mean)}
    chosen = [name for name, each in found.items() if (each.below(equal) if better else equal.below(each))]
    return "; ".join(chosen) or "no case"


def _rates(rows: Rows) -> str:
    """What the learning rate has to do with it."""
    best = [_at_its_best_rate(rows, lam) for lam in (0.0, 1.0)]
    if min(each.seeds for each in best) < 2:
        return "The learning rate in the plane has not been varied yet."
    ratios, equal = [ratio(rows, case) for case in (BASE, DECAYS, SLOW)], Spread(1.0, 0.0, 9)
    text = (
        f"In the plane the error with lambda 1 is {ratios[0]:.2f} of that with lambda 0 at the constant learning rate "
        f"{BASE['rate']:g}, {ratios[1]:.2f} where the rate decays to 0 (cosine), and {ratios[2]:.2f} at "
        f"{SLOW['rate']:g}. Each with the best of these, lambda 1 ({best[1]:.3f}) is {compared(best[1], best[0])} "
        f"lambda 0 ({best[0]:.3f})."
    )
    if ratios[0].below(equal) and ratios[2].seeds > 1 and not ratios[2].below(equal):
        text += (
            " So here the learning rate decides most of it: the full gradient is worth its noise where steps are too "
            "large for lambda 0, and gains nothing beyond the error bars at the small rate."
        )
    return text


def _at_its_best_rate(rows: Rows, lam: float) -> Spread:
    ends = [rows.spread(f"error_{LOOKS[-1]}", **case, lam=lam) for case in (BASE, DECAYS, SLOW)]
    return min((end for end in ends if end.seeds > 1), key=lambda end: end.mean, default=ends[0])


def recommend(rows: Rows) -> str:
    best, full = (_at_its_best_rate(rows, lam) for lam in (0.0, 1.0))
    if min(best.seeds, full.seeds) < 2:
        return ""
    return (
        f"and with the best of three learning rates the error of the full gradient there, {full:.3f}, is "
        f"{compared(full, best)} that of lambda 0, {best:.3f}"
    )


def _dimensions(rows: Rows) -> str:
    found = {case["dim"]: ratio(rows, case) for case in FACTORS if {**case, "dim": BASE["dim"]} == BASE}
    ratios = {dim: each for dim, each in found.items() if each.seeds > 1}
    if len(ratios) < 2:
        return ""
    listed = ", ".join(f"{each:.2f} in {dim}" for dim, each in sorted(ratios.items()))
    nearly_equal = all(abs(each.mean - 1) < 0.1 for dim, each in ratios.items() if dim > 2)
    return (
        f" By dimension, at the rate {BASE['rate']:g}, the error with lambda 1 over that with lambda 0 is {listed}"
        + (": with more dimensions than two little is left of the gain." if nearly_equal else ".")
    )


def draw(rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    found = {named(case, BASE): ratio(rows, case) for case in FACTORS}
    found = {name: each for name, each in found.items() if each.seeds}
    bars = [each.deviation if each.seeds > 1 else 0.0 for each in found.values()]
    axes.errorbar([each.mean for each in found.values()], range(len(found)), xerr=bars, fmt="o", capsize=3)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(max(len(found), 1) - 0.5, -0.5)
    axes.set(xlabel="error with lambda 1 over that with lambda 0")
    return figure


STUDY = Study(
    name="reasons",
    title="What decides whether the full gradient helps",
    question="Why does lambda = 1 halve the error in the plane and double it on images?",
    settings=[{**case, "lam": lam} for lams in (LAMBDAS[:2], LAMBDAS[2:]) for case in FACTORS for lam in lams],
    run=run,
    seconds=lambda setting: 14.0 * max(1.0, setting["batch"] / 256),
    method=f"The three Gaussians of the chapter before, in more dimensions: their deviation there is that in the "
    f"plane, or a tenth of it (outside). MLP of width {WIDTH} and depth {DEPTH}, {STEPS:,} steps of "
    f"{BASE['batch']}, half of "
    f"the rows with r < t, p = 0, paired, Adam at {BASE['rate']:g}, weights averaged. One factor is varied at a time.",
    draw=draw,
    answer=answer,
    doubt="Many more steps at the small learning rate, and a network whose derivative in z is much larger, as that of "
    "a deep transformer may be.",
    recommend=recommend,
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
