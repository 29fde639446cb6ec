"""Real images: Fashion-MNIST, one step, beside flow matching in as much training time.

python -m studies.fashion [--list | --quick | --minutes M]

The originals are where Debian's package dataset-fashion-mnist puts them; FASHION_MNIST names another folder.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mmf_fast import MeanFlowLoss, data
from mmf_fast.config import Config, load
from mmf_fast.data.prepare import prepare
from mmf_fast.evaluation.classifier import Classifier, train_classifier
from mmf_fast.evaluation.distances import frechet_distance, nearest, precision_recall
from mmf_fast.sampling import sample_in_chunks
from mmf_fast.train import build_loss
from mmf_fast.training.engines import Engine, build_engine
from studies.methods import sampler_of
from studies.rows import Rows, Setting, Spread, cheapest, compared, table
from studies.runner import Study, main
from studies.training import relative_cost, train

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOURCE = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
A_MINUTE = 140  # steps of flow matching, as one core of the first rows' computer makes them
MINUTES = 8  # for the steps of a run
SHORTER = (2, 4)  # minutes, of those that are looked at over time
ROUNDS = 20  # of a step beside one of flow matching
EVALUATIONS = (1, 2, 16)
COUNT = 2000  # samples judged
ALL_ENDS = {"objective": "mmf", "times": {"share": 0.25, "r": "logit_normal", "r_mean": -2.0, "r_std": 2.0}}
TO_DATA = {"objective": "meanflow", "times": {"share": 0.5, "t": "uniform", "r": "zero"}}
METHODS: dict[str, dict[str, Any]] = {  # the loss, in the order of the cost of a step
    "flow matching": {"objective": "flow_matching"},
    "r = 0 after flow matching": TO_DATA,
    "r = 0": TO_DATA,
    "lambda 0": {**ALL_ENDS, "lam": 0},
    "lambda 0.1": {**ALL_ENDS, "lam": {"kind": "linear", "value": 0.1, "warmup": 1000}},
    "lambda 1": {**ALL_ENDS, "lam": {"kind": "linear", "value": 1, "warmup": 1000}},
}
FIRST = {"r = 0 after flow matching": 1 / 3}  # share of the steps before the first intervals
OURS = [method for method in METHODS if method != "flow matching"]
OVER_TIME = ("flow matching", "r = 0 after flow matching", "lambda 0")


@functools.cache
def dataset() -> data.Dataset:
    """The training and the test images where the recipe has them, prepared unless they are there."""
    config = load("fashion")
    for split, key in {"train": "path", "validation": "validation"}.items():
        if not Path(config.data[key]).exists():
            prepare(SOURCE, config.data[key], split=split)
    return data.load(**config.data)


@functools.cache
def judge(images: Any) -> tuple[Classifier, Tensor, Tensor]:
    """A classifier of the training images, the features of all of them, and those of as many as there are samples."""
    classifier = train_classifier(images)
    features = classifier.judge(images.split("train")[0])[0]
    some = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:COUNT]
    return classifier, features, features[some]


def figures(images: Any, x: Tensor, y: Tensor, name: str) -> dict[str, float]:
    """Of samples x of the labels y, at most COUNT."""
    classifier, train_features, some = judge(images)
    features, found = classifier.judge(x)
    precision, recall = precision_recall(features, some)
    return {
        f"frechet{name}": frechet_distance(features, train_features),
        f"agreement{name}": float((found == y).double().mean()),
        f"precision{name}": precision,
        f"recall{name}": recall,
    }


def config_of(method: str, quick: bool, start: int = 0) -> Config:
    """The recipe with the loss of a method, whose first intervals come at step `start`."""
    loss = {**METHODS[method], "p": 0.5}
    if start:
        loss["times"] = {**loss["times"], "start": start}
    smaller = ["model.base_channels=4", "train.batch=8"] if quick else []
    return load("fashion", [f"loss={json.dumps(loss)}", *smaller])


def seeded_loss(config: Config, images: Any, seed: int) -> MeanFlowLoss:
    torch.manual_seed(seed)
    return build_loss(config, images)


def steps_of(method: str, minutes: int, images: Any, seed: int, quick: bool) -> tuple[int, int]:
    """How many steps take the time, and how many of them come before the first intervals."""

    def engine_of(config: Config) -> Engine:
        return build_engine(seeded_loss(config, images, seed), config.optimizer, config.train, seed)

    config, beside = config_of(method, quick), config_of("flow matching", quick)
    rounds = 2 if quick else ROUNDS
    cost = relative_cost(engine_of(config), engine_of(beside), images, config.train.batch, rounds)
    first = FIRST.get(method, 0.0)
    count = round((4 if quick else A_MINUTE * minutes) / (first + (1 - first) * cost))
    return count, round(count * first)


def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
    images = data.load("synthetic", shape=(1, 28, 28), num_classes=10, count=256) if quick else dataset()
    count, start = steps_of(setting["method"], setting["minutes"], images, seed, quick)
    config = config_of(setting["method"], quick, start)
    net = train(
        seeded_loss(config, images, seed), images, steps=count, batch=config.train.batch, seed=seed,
        optimizer=config.optimizer, compiled=False,
    )  # fmt: skip
    y = torch.arange(20 if quick else COUNT) % 10
    noise = torch.randn(len(y), *images.shape, generator=torch.Generator().manual_seed(seed))
    test, labels = images.split("validation")
    test, labels, train_images = test[: len(y)], cast(Tensor, labels)[: len(y)], images.split("train")[0]
    result = {"steps": float(count), "nearest_test": float(nearest(test, train_images)[0].median())}
    result |= figures(images, test, labels, "_test")
    for k in EVALUATIONS:
        x = sample_in_chunks(net, noise, k, 200, sampler=sampler_of(setting), y=y)
        result |= figures(images, x, y, f"_{k}")
        if k == 1:
            result["nearest_1"] = float(nearest(x, train_images)[0].median())
    return result


# ---- what the rows say -----------------------------------------------------------------------------------------------


def answer(rows: Rows) -> str:
    def figure(name: str | Callable[[Mapping[str, float]], float], method: str) -> Spread:
        return rows.spread(name, method=method, minutes=MINUTES)

    lines: dict[str, list[Spread]] = {}
    for method in METHODS:
        for k in EVALUATIONS:
            names = (f"frechet_{k}", f"agreement_{k}", f"precision_{k}", f"recall_{k}")
            lines[f"{method}, {k} evaluation{'s' if k > 1 else ''}"] = [figure(name, method) for name in names]
    lines["test images"] = [rows.spread(f"{name}_test") for name in ("frechet", "agreement", "precision", "recall")]
    most = f"frechet_{EVALUATIONS[-1]}"
    found = in_one(rows)
    best = cheapest(found) or "lambda 0"
    one, many = found[best], figure(most, "flow matching")
    share = figure(lambda figures: figures["agreement_1"] / figures["agreement_test"], best)
    others = "; ".join(
        f"{method}: {other:.1f}, {compared(other, one)} this"
        for method, other in found.items()
        if method != best and other.seeds
    )
    over_time: dict[str, list[Spread]] = {}
    for minutes in (*SHORTER, MINUTES):
        flow, *ours = ({"method": method, "minutes": minutes} for method in OVER_TIME)
        over_time[f"{minutes}"] = [
            rows.spread(most, **flow),
            *(
                found
                for each in ours
                for found in (rows.spread("frechet_1", **each), rows.ratio("frechet_1", each, flow, over=most))
            ),
        ]
    return "\n\n".join(
        [
            f"The least Frechet distance in one evaluation has {best}: {one:.1f}, where {EVALUATIONS[-1]} evaluations "
            f"of flow matching reach {many:.1f} in as much training time and one evaluation of it "
            f"{figure('frechet_1', 'flow matching'):.1f}; the classifier agrees with the label asked for {share:.3f} "
            f"times as often as on test images. {others}. A sample is {figure('nearest_1', best):.2f} from the nearest "
            f"training image, in the median, a test image {rows.spread('nearest_test'):.2f}: none is copied.",
            table("trained as, with", ["Frechet distance", "class agreement", "precision", "recall"], lines, ".2f"),
            table(
                "minutes of training",
                [
                    f"{EVALUATIONS[-1]} evaluations of flow matching",
                    *(words for method in OVER_TIME[1:] for words in (f"one, {method}", "ratio")),
                ],
                over_time, ".2f",
            ),
        ]
    )  # fmt: skip


def in_one(rows: Rows) -> dict[str, Spread]:
    """The Frechet distance of one evaluation by every method of ours."""
    return {method: rows.spread("frechet_1", method=method, minutes=MINUTES) for method in OURS}


def recommend(rows: Rows) -> str:
    found = in_one(rows)
    if (best := cheapest(found)) is None:
        return ""
    others = ", ".join(
        f"{spread:.1f} with {method}" for method, spread in found.items() if method != best and spread.seeds
    )
    words = {
        "r = 0": "lambda 0 and intervals that end at r = 0",
        "r = 0 after flow matching": "lambda 0 and intervals that end at r = 0, after a third of the steps without any",
    }
    return f"on Fashion-MNIST, trained as long, {words.get(best, best)} (Frechet distance {found[best]:.1f}; {others})"


def draw(rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    result = Figure(figsize=(9, 4), layout="constrained")
    axes, over_time = result.subplots(1, 2, sharey=True)

    colors = {method: f"C{number}" for number, method in enumerate(METHODS)}

    def curve(on: Axes, places: Sequence[float], found: Sequence[Spread], method: str, rest: str, style: str) -> None:
        on.errorbar(places, [each.mean for each in found], [each.deviation for each in found], fmt=style, capsize=3,
                    color=colors[method], label=method + rest)  # fmt: skip

    for number, method in enumerate(METHODS):
        places = [k * 1.05 ** (number - 1.5) for k in EVALUATIONS]
        found = [rows.spread(f"frechet_{k}", method=method, minutes=MINUTES) for k in EVALUATIONS]
        curve(axes, places, found, method, "", "o-")
    minutes = (*SHORTER, MINUTES)
    for method, k, style in (
        ("r = 0 after flow matching", 1, "o-"),
        ("lambda 0", 1, "o-"),
        ("flow matching", 1, "o-"),
        ("flow matching", EVALUATIONS[-1], "s:"),
    ):
        found = [rows.spread(f"frechet_{k}", method=method, minutes=each) for each in minutes]
        curve(over_time, minutes, found, method, f", {k} evaluation{'s' if k > 1 else ''}", style)
    for on, ticks in ((axes, EVALUATIONS), (over_time, minutes)):
        on.axhline(rows.spread("frechet_test").mean, color="0.5", linestyle=":", label="test images")
        on.set_xscale("log")
        on.set_yscale("log")
        on.set_xticks(ticks, [str(each) for each in ticks])
        on.minorticks_off()
        on.legend(fontsize=8)
    axes.set(xlabel="evaluations of the network for a sample", ylabel="Frechet distance")
    over_time.set(xlabel="minutes of training")
    return result


STUDY = Study(
    name="fashion",
    title="Real images: Fashion-MNIST in one step",
    question="How near does one evaluation come to many steps of flow matching, on real images, trained as long?",
    settings=[
        *({"method": method, "minutes": MINUTES} for method in METHODS),
        *({"method": method, "minutes": minutes} for minutes in SHORTER for method in OVER_TIME),
    ],
    run=run,
    seconds=lambda setting: 60.0 * setting["minutes"] + 240,
    method=f"Fashion-MNIST (60,000 training images of 28x28, 10 classes), the network and the optimizer of "
    f"configs/fashion.yaml, p = 0.5, {MINUTES} minutes of one core for the steps of each run, whatever the method, or "
    f"fewer for the curves over time, each with a schedule of its own. A minute is the time of {A_MINUTE} steps of "
    f"flow matching, which one core of the first runs' computer made in it, and a step of each run is timed in turn "
    f"with one of these; the runs before this was so were timed alone. Lambda 0, 0.1 and 1 have a quarter of the rows "
    f"as intervals of all ends, paired; r = 0 has half of them, which end at r = 0, lambda 0, conditional tangents; "
    f"after flow matching: no intervals in the first third of the steps. Judged are {COUNT:,} samples, in the "
    f"features of a classifier of the training images, beside as many test images. The rows of flow matching here were "
    f"drawn by u(z, r, t) for a step from t to r; by u(z, t, t), which is what it learned, another run of 2 minutes "
    f"has a distance of 436, 260 and 116 with 1, 2 and 16 evaluations, within the error bars of these rows.",
    recommend=recommend,
    draw=draw,
    answer=answer,
    doubt="A longer training: none of these runs has converged, and more evaluations gain most where it has.",
)

if __name__ == "__main__":
    main(STUDY)
