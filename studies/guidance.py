"""What it costs to leave the scale of guidance open until samples are drawn: the 8x8 digits.

python -m studies.guidance [--list | --quick | --minutes M]
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from mmf_fast import Guidance, MeanFlowLoss, Optimizer, TimeSampler
from mmf_fast.data import Dataset, load
from mmf_fast.evaluation.classifier import Classifier, train_classifier
from mmf_fast.evaluation.distances import frechet_distance, precision_recall
from mmf_fast.models import DiT
from mmf_fast.sampling import sample_in_chunks
from studies.rows import Rows, Setting, Spread, compared, table
from studies.runner import Study, main
from studies.training import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, BATCH, WIDTH, DEPTH = 1500, 128, 96, 2
SCALES = (1.0, 1.5, 2.0, 3.0)
RANGE = (1.0, 4.0)
SETS = 5  # of samples, each with the labels of the validation split
WAYS = ("told", "kappa", "omega")
SETTINGS: list[dict[str, Any]] = [
    {"way": "told", "scale": 0.0},  # of the whole range
    {"way": "kappa", "scale": 1.0},
    *({"way": way, "scale": scale} for scale in SCALES[1:] for way in ("kappa", "omega")),
]


def guidance_of(setting: Setting) -> Guidance:
    """A range, or one scale w with the weight 1 on the sample's own velocity, or with the weight w."""
    scale = setting["scale"]
    if setting["way"] == "told":
        return Guidance(omega=RANGE)
    return Guidance(kappa=1 - 1 / scale) if setting["way"] == "kappa" else Guidance(omega=scale)


@functools.cache
def judged(seed: int, quick: bool) -> tuple[Dataset, Classifier]:
    data = load("digits", seed=seed)
    return data, train_classifier(data, most=20) if quick else train_classifier(data)


def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
    data, classifier = judged(seed, quick)
    torch.manual_seed(seed)
    told = setting["way"] == "told"
    net = DiT(8, channels=1, patch_size=4, width=WIDTH, depth=DEPTH, heads=4, num_classes=10, guided=told)
    times = TimeSampler(share=0.25, r="logit_normal", r_mean=-2.0, r_std=2.0)
    loss_fn = MeanFlowLoss(net, times=times, paired=True, p=0.5, guidance=guidance_of(setting))
    averaged = train(
        loss_fn, data, steps=6 if quick else STEPS, batch=BATCH, seed=seed, compiled=False,
        optimizer=Optimizer(lr=1e-3, clip=1.0, schedule="cosine", ema=0.995),
    )  # fmt: skip
    images, labels = data.split("train")[0], data.split("validation")[1]
    assert labels is not None
    features = classifier.judge(images)[0]
    y = labels.repeat(SETS)
    noise = torch.randn(len(y), *data.shape, generator=torch.Generator().manual_seed(seed))
    figures: dict[str, float] = {}
    for scale in SCALES if told else (setting["scale"],):
        given: dict[str, Any] = {"omega": scale} if told else {}
        x = sample_in_chunks(averaged, noise, y=y, **given)
        found, classes = classifier.judge(x)
        sets = found.split(len(labels))
        some = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[: len(labels)]]
        support = [precision_recall(each, some) for each in sets]
        figures |= {
            f"frechet_{scale:g}": sum(frechet_distance(each, features) for each in sets) / SETS,
            f"precision_{scale:g}": sum(precision for precision, _ in support) / SETS,
            f"recall_{scale:g}": sum(recall for _, recall in support) / SETS,
            f"agreement_{scale:g}": float((classes == y).double().mean()),
        }
    return figures


# ---- what the rows say -----------------------------------------------------------------------------------------------


def figure_of(rows: Rows, name: str, way: str, scale: float) -> Spread:
    one = "kappa" if scale == 1 and way == "omega" else way  # at scale 1 both are no guidance
    return rows.spread(f"{name}_{scale:g}", way=one, **({} if way == "told" else {"scale": scale}))


def answer(rows: Rows) -> str:
    def figure(name: str, way: str, scale: float) -> Spread:
        return figure_of(rows, name, way, scale)

    def beside(name: str, form: str) -> str:
        pairs = {scale: (figure(name, "told", scale), figure(name, "kappa", scale)) for scale in SCALES}
        return ", ".join(
            f"at {scale:g} {told:{form}} ({compared(told, one)} {one:{form}})" for scale, (told, one) in pairs.items()
        )

    return "\n\n".join(
        [
            "The Frechet distance of the network that is told its scale, beside that of a network of this scale alone "
            f"with the same target, is {beside('frechet', '.2f')}. Its precision is {beside('precision', '.3f')}; its "
            f"recall {beside('recall', '.3f')}.",
            table(
                "scale; Frechet distance / precision / recall / class agreement",
                ["told, one network", "of this scale, kappa", "of this scale, omega"],
                {
                    f"{scale:g}": [
                        " / ".join(
                            f"{figure(name, way, scale):{form}}"
                            for name, form in (("frechet", ".1f"), ("precision", ".2f"), ("recall", ".2f"),
                                               ("agreement", ".3f"))
                        )
                        for way in WAYS
                    ]
                    for scale in SCALES
                },
            ),
        ]
    )  # fmt: skip


def draw(rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    result = Figure(figsize=(9, 3), layout="constrained")
    titles = {"frechet": "Frechet distance in one step", "precision": "precision", "recall": "recall"}
    for axes, (name, title) in zip(result.subplots(1, 3), titles.items(), strict=True):
        for way, label in zip(WAYS, ("told, one network", "one scale, kappa", "one scale, omega"), strict=True):
            found = {scale: spread for scale in SCALES if (spread := figure_of(rows, name, way, scale)).seeds}
            axes.errorbar(
                list(found), [each.mean for each in found.values()], [each.deviation for each in found.values()],
                fmt="o-", capsize=3, label=label,
            )  # fmt: skip
        axes.set(xlabel="scale of the guidance", title=title)
    axes.legend()
    return result


STUDY = Study(
    name="guidance",
    title="Guidance of one scale, and of a range",
    question="Does a network that is told its scale draw as well as one that was trained for this scale alone?",
    settings=SETTINGS,
    run=run,
    seconds=lambda setting: 40.0,
    method=f"The 8x8 digits with a DiT of width {WIDTH} and {DEPTH} blocks of 4 tokens, {STEPS:,} steps of {BATCH}, a "
    f"quarter of the rows with r < t, lambda 0, paired, p = 0.5, Adam at 0.001 with a cosine schedule, weights "
    f"averaged, a tenth of the labels dropped. Told: scales between {RANGE[0]:g} and {RANGE[1]:g}. Of one scale w: "
    f"kappa 1 - 1 / w, which is the target of those who are told, or omega w. Figures are of one evaluation, in the "
    f"features of a classifier of the training split.",
    rehearsal=[SETTINGS[0], SETTINGS[3]],
    draw=draw,
    answer=answer,
    doubt="A range that is wider than the network is large; more classes, more pixels.",
)

if __name__ == "__main__":
    main(STUDY)
