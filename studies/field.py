"""How good a network is after as much training time, by flow matching, by ours and as the field trains MeanFlow.

Time is counted in steps of flow matching, and what a step takes beside one of these is measured in turn with it.

python -m studies.field [--list | --quick | --minutes M]
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.field import WAYS, FieldLoss
from mmf_fast import MeanFlowLoss, Optimizer, TimeSampler, Train
from mmf_fast.data import conditions_of, load
from mmf_fast.evaluation.classifier import train_classifier
from mmf_fast.evaluation.distances import frechet_distance
from mmf_fast.models import DiT
from mmf_fast.sampling import sample_in_chunks
from mmf_fast.training.engines import Engine, build_engine
from studies.methods import FLOW_MATCHING, sampler_of, title
from studies.rows import Rows, Setting, Spread, compared, table
from studies.runner import Study, main
from studies.training import relative_cost

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIMES = (700, 1400, 2800, 5600)  # how many steps of flow matching take as long; the last some two minutes of one core
ROUNDS = 60  # of a step beside one of flow matching
BATCH = 128
HEIGHTS = (4, 6, 10, 20, 40, 60)  # that the figure names
OURS: list[dict[str, Any]] = [{"method": "mmf_fast", "lam": lam} for lam in (0.0, 0.1)]
ALIKE: dict[str, Any] = {"method": "mmf_fast, conditional tangent", "lam": 0.0}  # the loss of the field's ways
FIELD: list[dict[str, Any]] = [
    *({"method": way, "lam": 0.0} for way in WAYS),
    *({"method": way, "lam": 1.0} for way in ("torch.func.jvp", "double backward")),
]
SETTINGS: list[dict[str, Any]] = [
    FLOW_MATCHING,
    ALIKE,
    *FIELD[:1],
    *OURS,
    *FIELD[1:],
    {"method": "mmf_fast", "lam": 1.0},
]


def loss_of(setting: Setting, net: nn.Module) -> nn.Module:
    """All with p = 0 and a quarter of the rows as intervals, but flow matching, which has none."""
    method, times = setting["method"], TimeSampler(share=0.25)
    if method == "flow matching":
        return MeanFlowLoss(net, times=TimeSampler(share=0.0), p=0.0)
    if method == "mmf_fast":
        return MeanFlowLoss(net, times=times, lam=setting["lam"], paired=True, p=0.0)
    if method == ALIKE["method"]:
        return MeanFlowLoss(net, times=times, tangent="conditional", p=0.0)
    return FieldLoss(net, method, times, exact=setting["lam"] > 0, p=0.0)


def evaluations(setting: Setting) -> tuple[int, ...]:
    return (1, 2, 4, 16) if setting["method"] == "flow matching" else (1,)


def engine_of(setting: Setting, seed: int) -> Engine:
    torch.manual_seed(seed)
    net = DiT(8, channels=1, patch_size=4, width=96, depth=2, heads=4, num_classes=10)
    optimizer = Optimizer(lr=1e-3, clip=1.0, schedule="constant", ema=0.995)
    return build_engine(loss_of(setting, net), optimizer, Train(steps=1, batch=BATCH), seed)


def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
    data = load("digits", seed=seed)
    rounds = 2 if quick else ROUNDS
    step_cost = relative_cost(engine_of(setting, 0), engine_of(FLOW_MATCHING, 0), data, BATCH, rounds)
    engine = engine_of(setting, seed)
    classifier = train_classifier(data, epochs=1 if quick else 30)
    target = classifier.judge(data.split("train")[0])[0]
    labels = data.split("validation")[1]
    assert labels is not None
    noise = torch.randn(len(labels), *data.shape, generator=torch.Generator().manual_seed(seed))

    def distances() -> dict[str, float]:
        averaged = copy.deepcopy(engine.averaged()).cpu().eval()
        sampler = sampler_of(setting)
        found = {k: sample_in_chunks(averaged, noise, k, 200, sampler=sampler, y=labels) for k in evaluations(setting)}
        return {f"frechet_{k}": frechet_distance(classifier.judge(x)[0], target) for k, x in found.items()}

    figures: dict[str, float] = {"cost": step_cost}
    step = 0
    for limit in (1, 2) if quick else TIMES:
        while step < max(1, round(limit / step_cost)):
            x, y = data.batch(step, BATCH)
            engine.step(x, step, **conditions_of(y))
            step += 1
        figures |= {f"{name}_{limit}": value for name, value in distances().items()}
    return figures


# ---- what the rows say -----------------------------------------------------------------------------------------------


def named(setting: Setting) -> str:
    method = setting["method"]
    return title(setting) if method in ("flow matching", "mmf_fast") else f"{method}, lambda {setting['lam']:g}"


def limits_of(rows: Rows) -> list[float]:
    """The times at which the rows have a figure."""
    names = {name for row in rows for name in row["figures"] if name.startswith("frechet")}
    return sorted({float(name.split("_")[2]) for name in names})


def answer(rows: Rows) -> str:
    limits = limits_of(rows)

    def distances(setting: Setting, k: int = 1) -> list[Spread]:
        return [rows.spread(f"frechet_{k}_{limit:g}", **setting) for limit in limits]

    lines: dict[str, list[Any]] = {}
    for setting in SETTINGS:
        for k in evaluations(setting):
            several = f", {k} evaluations" if k > 1 else ""
            lines[named(setting) + several] = [*distances(setting, k), rows.spread("cost", **setting)]
    ours = {lam: distances({"method": "mmf_fast", "lam": lam})[-1] for lam in (0.0, 0.1, 1.0)}
    full = distances({"method": "torch.func.jvp", "lam": 1.0})[-1]
    alike, usual = (distances(each) for each in (ALIKE, FIELD[0]))
    less = [f"{limit:g}" for limit, one, other in zip(limits, alike, usual, strict=True) if one.below(other)]
    earlier = f"after {', '.join(less)} steps it is less" if less else "nor is it less earlier"
    return "\n\n".join(
        [
            f"Trained by torch.func.jvp at lambda 0, as MeanFlow is, for as long as {limits[-1]:g} steps of flow "
            f"matching take, one evaluation has a Frechet distance of {usual[-1]:.2f}; by mmf_fast, with the same "
            f"loss, as long and so for more steps, {alike[-1]:.2f}, {compared(alike[-1], usual[-1])} that "
            f"({earlier}). Paired rows, with the predicted tangent, have "
            f"{ours[0.0]:.2f} at lambda 0, {compared(ours[0.0], usual[-1])} that, and {ours[0.1]:.2f} at lambda 0.1. "
            f"With the full gradient (lambda 1) the conditional tangent, which biases the minimiser there, has "
            f"{full:.2f} by torch.func.jvp, the predicted one {ours[1.0]:.2f} by mmf_fast.",
            table("trained by", [*(f"{limit:g}" for limit in limits), "time of a step"], lines, ".2f"),
        ]
    )


def draw(rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    result = Figure(figsize=(9, 4.5), layout="constrained")
    axes = result.subplots()
    limits = limits_of(rows)
    for setting in SETTINGS:
        for k in evaluations(setting)[-1:] if setting["method"] == "flow matching" else (1,):
            found = [rows.spread(f"frechet_{k}_{limit:g}", **setting) for limit in limits]
            if found[0].seeds:
                label = named(setting) + (f", {k} evaluations" if k > 1 else "")
                style = "o-" if setting["method"].startswith("mmf_fast") else "s:" if k > 1 else "x--"
                axes.errorbar(limits, [f.mean for f in found], [f.deviation for f in found], fmt=style, capsize=3,
                              color="0.4" if k > 1 else None, label=label)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(limits, [f"{limit:g}" for limit in limits])
    axes.minorticks_off()
    axes.set_yticks(HEIGHTS, [f"{height}" for height in HEIGHTS])
    axes.set(xlabel="time, in steps of flow matching", ylabel="Frechet distance, one evaluation unless said")
    result.legend(loc="outside right center", fontsize=8)
    return result


STUDY = Study(
    name="field",
    title="Time to quality, beside the field",
    question="How good is one evaluation after as much training time, by ours and by the ways others train it?",
    settings=SETTINGS,
    run=run,
    seconds=lambda setting: 135.0,
    method=f"The 8x8 digits with a DiT of width 96 and 2 blocks of 4 tokens, batches of {BATCH}, Adam at 0.001, "
    "weights averaged, p = 0, a quarter of the rows with r < t. Time is counted in steps of flow matching: a step of "
    "each run was timed in turn with one of flow matching, none compiled, on one core. The ways of the field are those "
    "of benchmarks/field.py, written from public code. Frechet distance in the features of a classifier of the "
    "training split.",
    draw=draw,
    answer=answer,
    doubt="A GPU, where other parts of a step take the time; a larger network; compilation, which makes ours faster "
    "and which torch.func.jvp does not gain from as much.",
)

if __name__ == "__main__":
    main(STUDY)
