"""Few training images: what one evaluation is worth, and whether it repeats them.

python -m studies.little_data [--list | --quick | --minutes M]
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmf_fast import MeanFlowLoss, Optimizer, TimeSampler
from mmf_fast.data import ArrayDataset, load
from mmf_fast.evaluation.classifier import Classifier, train_classifier
from mmf_fast.evaluation.distances import frechet_distance, nearest
from mmf_fast.models import UNet
from mmf_fast.sampling import sample_in_chunks
from studies.fashion import dataset as fashion
from studies.rows import Rows, Setting, Spread, table
from studies.runner import Study, main
from studies.training import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, BATCH = 1000, 64
COUNTS = (100, 1000, 10_000, 50_000)
LAMBDAS = (0.0, 0.1)
SAMPLES = 2000
REPEATED = 1 / 3  # a sample nearer to a training image than this share of the distance to the next one repeats it


@functools.cache
def halves(quick: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels, of 14x14: means of 2x2 pixels."""
    source = load("synthetic", shape=(1, 28, 28), num_classes=10, count=2000) if quick else fashion()
    parts: list[Tensor] = []
    for name in ("train", "validation"):
        x, y = source.split(name)
        assert y is not None
        parts += [F.avg_pool2d(x.float(), 2), y]
    return parts[0], parts[1], parts[2], parts[3]


def few(count: int, seed: int, quick: bool) -> ArrayDataset:
    """`count` of the training images, others for every seed."""
    x, y, test, labels = halves(quick)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
    splits: Any = {"train": (x[rows], y[rows]), "validation": (test, labels)}
    return ArrayDataset("fashion 14x14", splits, num_classes=10, seed=seed)


@functools.cache
def judge(quick: bool) -> tuple[Classifier, Tensor]:
    """A classifier of all training images, and the features of the test images."""
    x, y, test, labels = halves(quick)
    splits: Any = {"train": (x, y), "validation": (test, labels)}
    images = ArrayDataset("fashion 14x14", splits, num_classes=10)
    classifier = train_classifier(images, most=100 if quick else 2000)
    return classifier, classifier.judge(test)[0]


def repeated(x: Tensor, images: Tensor) -> float:
    """The share of rows of x that are nearer to one image than REPEATED times the distance to the second nearest
    (Yoon et al., Diffusion probabilistic models generalize when they fail to memorize, 2023)."""
    distance, index = nearest(x, images)
    count = 0
    for row, best, at in zip(x, distance.tolist(), index.tolist(), strict=True):
        others = (images - row).flatten(1).norm(dim=1)
        others[at] = torch.inf
        count += best < REPEATED * float(others.min())
    return count / len(x)


def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
    images = few(setting["images"], seed, quick)
    torch.manual_seed(seed)
    net = UNet(14, channels=1, base_channels=8 if quick else 16, channel_mults=[1, 2], blocks=1,
               attention_resolutions=[7], num_classes=10)  # fmt: skip
    times = TimeSampler(share=0.25, r="logit_normal", r_mean=-2.0, r_std=2.0)
    loss_fn = MeanFlowLoss(net, times=times, lam=setting["lam"], paired=True, p=0.5)
    averaged = train(
        loss_fn, images, steps=3 if quick else STEPS, batch=8 if quick else BATCH, seed=seed, compiled=False,
        optimizer=Optimizer(lr=1e-3, clip=1.0, schedule="cosine", ema=0.99),
    )  # fmt: skip
    y = torch.arange(20 if quick else SAMPLES) % 10
    noise = torch.randn(len(y), *images.shape, generator=torch.Generator().manual_seed(seed))
    classifier, target = judge(quick)
    figures: dict[str, float] = {}
    for k in (1, 4):
        x = sample_in_chunks(averaged, noise, k, 200, y=y)
        features, labels = classifier.judge(x)
        figures |= {
            f"frechet_{k}": frechet_distance(features, target),
            f"agreement_{k}": float((labels == y).double().mean()),
            f"repeated_{k}": repeated(x[:200], images.split("train")[0]),
        }
    own = classifier.judge(images.split("train")[0])[0]
    return figures | {"frechet_training": frechet_distance(own, target)}


# ---- what the rows say -----------------------------------------------------------------------------------------------


def answer(rows: Rows) -> str:
    def figure(name: str, count: int, lam: float = LAMBDAS[0]) -> Spread:
        return rows.spread(name, images=count, lam=lam)

    def line(count: int, lam: float) -> list[Any]:
        names = ("frechet_1", "frechet_4", "frechet_training", "agreement_1", "repeated_1", "repeated_4")
        return [figure(name, count, lam) for name in names]

    def named(counts: list[int]) -> str:
        return " and ".join(f"{count:,}" for count in counts) or "none"

    zero, some = ({count: figure("frechet_1", count, lam) for count in COUNTS} for lam in LAMBDAS)
    poorer = [count for count in COUNTS if zero[COUNTS[-1]].below(zero[count])]
    worse, better = (
        [count for count in COUNTS if one[count].below(other[count])] for one, other in ((zero, some), (some, zero))
    )
    pairs = [(f"repeated_{k}", count, lam) for k in (1, 4) for count in COUNTS for lam in LAMBDAS]
    repeated = max((spread.mean for pair in pairs if (spread := figure(*pair)).seeds), default=0.0)
    return "\n\n".join(
        [
            "At lambda 0 one evaluation has a Frechet distance to the test images of "
            + ", ".join(f"{spread:.2f} with {count:,} images" for count, spread in zero.items() if spread.seeds)
            + f". Beyond the error bars {COUNTS[-1]:,} images are better than fewer: {named(poorer)}; lambda "
            f"{LAMBDAS[1]:g} is worse than lambda 0 with these numbers of images: {named(worse)}; better with: "
            f"{named(better)}. Repeated are samples that are nearer to a training image than a third of the distance "
            f"to the next one: {repeated:.1%} of them at most, in one or four evaluations.",
            table(
                "images, lambda",
                ["one evaluation", "four", "the images", "agreement in one", "repeated in one", "repeated in four"],
                {f"{count:,}, {lam:g}": line(count, lam) for count in COUNTS for lam in LAMBDAS}, ".2f",
            ),
        ]
    )  # fmt: skip


def draw(rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    result = Figure(figsize=(8, 3.5), layout="constrained")
    for axes, name, label in zip(
        result.subplots(1, 2),
        ("frechet_1", "repeated_1"),
        ("Frechet distance", "share of repeated images"),
        strict=True,
    ):
        for lam in LAMBDAS:
            counts = [count for count in COUNTS if rows.where(images=count, lam=lam)]
            found = [rows.spread(name, images=count, lam=lam) for count in counts]
            axes.errorbar(counts, [f.mean for f in found], [f.deviation for f in found], fmt="o-", capsize=3,
                          label=f"lambda {lam:g}")  # fmt: skip
        axes.set_xscale("log")
        axes.set(xlabel="training images", ylabel=f"{label}, one evaluation", ylim=(0, None))
        axes.legend()
    return result


STUDY = Study(
    name="little_data",
    title="Little data",
    question="How many images does one evaluation need, and from how few does it repeat them?",
    settings=[{"images": count, "lam": lam} for count in COUNTS for lam in LAMBDAS],
    run=run,
    seconds=lambda setting: 300.0,
    method=f"Fashion-MNIST in 14x14 pixels, so many of its training images, a UNet of 16 and 32 channels, {STEPS:,} "
    f"steps of {BATCH}, paired, p = 0.5, Adam at 0.001 with a cosine schedule, weights averaged. {SAMPLES:,} samples "
    f"against the test images, in the features of a classifier of all training images.",
    draw=draw,
    answer=answer,
    doubt="More steps: 100 images are seen 640 times here, 50,000 once or twice; a larger network.",
)

if __name__ == "__main__":
    main(STUDY)
