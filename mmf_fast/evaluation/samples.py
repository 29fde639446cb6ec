"""How good samples are, beside the same figures for real data the network has not seen.

    mmf evaluate --run runs/digits
    mmf evaluate --run runs/faces data.validation=data/faces-val    # the run's data, but for what is written so

prints a table and writes evaluation.json and evaluation_*.png into the run folder. Points (toys):

    sliced_wasserstein   to the training split

Labelled images (digits), judged by a classifier trained on the training split alone:

    frechet_distance     to the training split, in the penultimate features of the classifier
    precision, recall    share of samples among the training images, and of these among the samples, in those features
    class_agreement      share of samples to which the classifier gives the label they were asked for
    nearest_distance     median Euclidean distance to the nearest training image
    nearest_share        share of samples nearer to a training image than 99 % of the validation images: memorising

The column "validation" holds the figure of the validation split against the training split. It is what fresh real data
get: sets of samples are as large as the validation split and have its labels. A nearest_distance far below that column
with a nearest_share far above 0.01 means that training images are reproduced.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmf_fast import data
from mmf_fast.devices import choose_device, device_of
from mmf_fast.evaluation.classifier import train_classifier
from mmf_fast.evaluation.distances import frechet_distance, nearest, precision_recall, sliced_wasserstein
from mmf_fast.files import write_text
from mmf_fast.models import load_pretrained
from mmf_fast.pictures import save_arrows, save_field, save_rows
from mmf_fast.sampling import (
    Sampler,
    evaluating,
    guidance_of,
    guidance_options,
    import_made,
    network_option,
    noises_of,
    sample_in_chunks,
    sampler_option,
    samples_of,
    told_rows,
)

__all__ = ["evaluate", "evaluate_run", "table"]

MOST = 10_000  # images judged for each number of steps, by default at most
IMAGE_DRAWS = 5  # so many sets of samples are judged, each like the validation split in size and labels, and averaged

_TITLES = {
    "sliced_wasserstein": "sliced Wasserstein distance to the training split",
    "frechet_distance": "Frechet distance to the training split",
    "precision": "precision",
    "recall": "recall",
    "class_agreement": "class agreement",
    "nearest_distance": "median distance to the nearest training image",
    "nearest_share": "share nearer than 99 % of the validation split",
}


def evaluate(
    net: Callable[..., Tensor],
    dataset: data.Dataset,
    steps: Sequence[int] = (1, 2, 4),
    seed: int = 0,
    folder: str | Path | None = None,
    count: int = MOST,
    sampler: Sampler = "average",
    guidance: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The figures named at the top of this file, for each number of steps; with `folder`, pictures are written there.

    net: u(z, r, t, y=None) for samples of dataset.shape.  seed: of the noise, which all numbers of steps share.
    count: images judged for each number of steps, at most.  sampler: what a step uses, see `mmf_fast.sample`.
    guidance: omega, t_min, t_max of a network that is told them.
    Returns {"data", "seed", "sampler", "guidance", "samples", "figures": {name: {"validation" or number of steps:
    value}}} and, for images, "classifier_accuracy": {"train", "validation"}.
    Raises ValueError for steps below 1, an unknown sampler, a count below 2, samples that are not finite, a dataset
    that is neither points nor labelled images, a folder that cannot be written.
    """
    if not steps or min(steps) < 1:
        raise ValueError(f"steps are {list(steps)}: give numbers of evaluations per sample, each at least 1")
    if count < 2:
        raise ValueError(f"count is {count}: a covariance needs at least 2 samples")
    path, told = None if folder is None else Path(folder), dict[str, Any](guidance or {})

    def noises(count: int, steps: int) -> list[Tensor]:
        return noises_of(None, (count, *dataset.shape), steps, sampler, torch.Generator().manual_seed(seed))

    def drawn(count: int, steps: int, **cond: Any) -> Tensor:
        x = sample_in_chunks(net, noises(count, steps), steps, sampler=sampler, **cond, **told)
        if not torch.isfinite(x).all():
            raise ValueError("the network gives samples that are not finite: its training has diverged")
        return x.cpu()

    with evaluating(net):
        if len(dataset.shape) == 1:
            size = len(dataset.split("validation")[0])
            samples = {k: drawn(size, k) for k in sorted(set(steps))}
            result = _evaluate_points(samples, dataset)
            if path and dataset.shape == (2,):
                one_step = samples[1] if 1 in samples else drawn(size, 1)
                _draw_points(net, told, noises(size, 1)[0], one_step, dataset, path)
        else:
            result = _evaluate_images(drawn, dataset, sorted(set(steps)), path, count)
    return {"data": dataset.name, "seed": seed, "sampler": sampler, "guidance": told, **result}


def evaluate_run(
    run: str | Path,
    steps: Sequence[int] = (1, 2, 4),
    seed: int = 0,
    device: str = "auto",
    pictures: bool = True,
    net: nn.Module | None = None,
    dataset: Any = None,
    count: int = MOST,
    sampler: Sampler = "average",
    overrides: Sequence[str] = (),
    guidance: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """`evaluate` for the network and the dataset of a run folder; writes evaluation.json and the pictures there.

    net, dataset: of one's own, in place of those the run names; net takes the weights of the run, dataset is what
        `data.as_dataset` takes.
    overrides: of the options of the data that the run names, as data.validation=FOLDER.
    Raises ValueError for a missing or damaged run too.
    """
    net, extra = load_pretrained(run, net)
    shape, num_classes = samples_of(net, extra, run)
    saved: Mapping[str, Any] = extra["data"] if isinstance(extra.get("data"), Mapping) else {}
    if overrides:
        from mmf_fast.config import data_options  # it needs omegaconf, which the extra [eval] does not bring

        if dataset is not None:
            raise ValueError(f"{overrides[0]}: is of the data that the run names; leave it out, or --data")
        saved = data_options(saved, overrides, Path(run) / "model.json")
    if dataset is None:
        if "name" not in saved:
            raise ValueError(
                f"{Path(run) / 'model.json'} does not name its data; give the folder of a training run, or its data "
                "with --data package.module:make"
            )
        dataset = data.load(**saved)
    judged = data.as_dataset(dataset)
    if (shape, num_classes) != (judged.shape, judged.num_classes):
        alike = f"data of as many classes, if your own as data.ArrayDataset(name, splits, num_classes={num_classes})"
        way_out = alike if shape == judged.shape else "the data it was trained with"
        raise ValueError(
            f"the network of {run} has shape {shape} and {num_classes} classes, "
            f"but {judged.name} has {judged.shape} and {judged.num_classes}; give {way_out}"
        )
    result = {"step": extra.get("step")} | evaluate(
        net.to(choose_device(device)), judged, steps, seed, run if pictures else None, count, sampler, guidance
    )
    write_text(Path(run) / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return result


def table(result: Mapping[str, Any]) -> str:
    """The figures of `evaluate` as text: one row per figure, one column per number of steps."""
    columns = list(next(iter(result["figures"].values())))
    heads = [name if name == "validation" else f"{name} step{'s' if name != '1' else ''}" for name in columns]
    width = max(len(_TITLES[name]) for name in result["figures"])
    lines = [" " * width + "".join(f"{head:>12}" for head in heads)]
    for name, row in result["figures"].items():
        lines.append(f"{_TITLES[name]:<{width}}" + "".join(f"{row[column]:>12.4f}" for column in columns))
    return "\n".join(lines)


def _evaluate_points(samples: Mapping[int, Tensor], dataset: data.Dataset) -> dict[str, Any]:
    """samples: by the number of steps."""
    (train, _), (validation, _) = dataset.split("train"), dataset.split("validation")
    sets = {"validation": validation} | {str(k): x for k, x in samples.items()}
    row = {name: sliced_wasserstein(x, train) for name, x in sets.items()}
    return {"samples": len(validation), "figures": {"sliced_wasserstein": row}}


def _draw_points(
    net: Callable[..., Tensor],
    told: Mapping[str, Any],
    noise: Tensor,
    one_step: Tensor,
    dataset: data.Dataset,
    folder: Path,
) -> None:
    """The field of velocities with the training points, and where noise goes in one step with the validation points."""
    save_field(lambda z, t: _instantaneous(net, z, t, told), dataset.split("train")[0], folder / "evaluation_field.png")
    save_arrows(noise, one_step, dataset.split("validation")[0], folder / "evaluation_arrows.png")


def _evaluate_images(
    drawn: Callable[..., Tensor], dataset: data.Dataset, steps: Sequence[int], folder: Path | None, count: int
) -> dict[str, Any]:
    """drawn: (number of samples, steps, y) -> samples of the labels y"""
    (train, train_labels), (validation, labels) = dataset.split("train"), dataset.split("validation")
    if train_labels is None or labels is None:
        raise ValueError(f"dataset {dataset.name} has images without labels: no figure is defined for it")
    if len(validation) > count:
        chosen = torch.randperm(len(validation), generator=torch.Generator().manual_seed(0))[:count]
        validation, labels = validation[chosen], labels[chosen]
    size, asked = len(validation), labels.repeat(max(1, min(IMAGE_DRAWS, count // len(validation))))
    with tqdm(total=2 + 2 * len(steps), desc="judging", leave=False, delay=2) as bar:
        classifier = train_classifier(dataset)
        train_features, train_found = classifier.judge(train)
        some = train_features[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:size]]
        bar.update()
        near = nearest(validation, train)[0]
        limit = float(near.quantile(0.01))

        def figures(x: Tensor, y: Tensor, distance: Tensor) -> dict[str, float]:
            features, found = classifier.judge(x)
            sets = features.split(size)  # Frechet distances can only be compared between sets of equal size and labels
            bar.update()
            support = [precision_recall(part, some) for part in sets]
            return {
                "frechet_distance": sum(frechet_distance(part, train_features) for part in sets) / len(sets),
                "precision": sum(precision for precision, _ in support) / len(sets),
                "recall": sum(recall for _, recall in support) / len(sets),
                "class_agreement": float((found == y).double().mean()),
                "nearest_distance": float(distance.median()),
                "nearest_share": float((distance <= limit).double().mean()),
            }

        columns, samples = {"validation": figures(validation, labels, near)}, {}
        for k in steps:
            samples[k] = drawn(len(asked), k, y=asked)
            bar.update()
            columns[str(k)] = figures(samples[k], asked, nearest(samples[k], train)[0])
    if folder:
        _draw_images(samples, train, validation, labels, folder)
    accuracy = {
        "train": float((train_found == train_labels).double().mean()),
        "validation": columns["validation"]["class_agreement"],
    }
    rows = {name: {column: value[name] for column, value in columns.items()} for name in columns["validation"]}
    return {"samples": len(asked), "classifier_accuracy": accuracy, "figures": rows}


def _draw_images(
    samples: Mapping[int, Tensor], train: Tensor, validation: Tensor, labels: Tensor, folder: Path, columns: int = 20
) -> None:
    """Rows of equal labels (and noise, for samples); then the samples of fewest steps above their nearest image."""
    turn = torch.zeros_like(labels)  # the first image of each class, then the second of each, ...
    for label in labels.unique():
        turn[labels == label] = torch.arange(int((labels == label).sum()))
    shown = torch.argsort(turn * (int(labels.max()) + 1) + labels)[:columns]
    shown = shown[torch.argsort(labels[shown], stable=True)]
    named = {f"{k} step{'s' if k > 1 else ''}": x[shown] for k, x in samples.items()}
    save_rows({"validation": validation[shown], **named}, folder / "evaluation_samples.png")
    first, x = next(iter(named.items()))
    save_rows({first: x, "nearest in training": train[nearest(x, train)[1]]}, folder / "evaluation_nearest.png")


@torch.no_grad()
def _instantaneous(net: Callable[..., Tensor], z: Tensor, t: float, told: Mapping[str, Any]) -> Tensor:
    """The velocity u(z, t, t)."""
    times = torch.full((len(z),), t, device=device_of(net))
    return net(z.to(times.device), times, times, **told_rows(told, len(z), times.device))


# ---- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="mmf evaluate", description="Judge the samples of a trained run.", allow_abbrev=False
    )
    result.add_argument("--run", type=Path, required=True, help="run folder; evaluation.json and pictures go there")
    result.add_argument("--steps", type=number, nargs="+", default=[1, 2, 4], help="evaluations (default: 1 2 4)")
    sampler_option(result)
    guidance_options(result)
    result.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    result.add_argument("--count", type=int, default=MOST, help=f"images per column at most (default: {MOST})")
    result.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    network_option(result)
    result.add_argument("--data", metavar="MODULE:MAKE", help="data of one's own, with a validation split")
    result.add_argument(
        "overrides",
        nargs="*",
        metavar="data.key=value",
        help="other options of the run's data: data.validation=FOLDER, data.path=FOLDER of moved data",
    )
    return result


def number(word: str) -> int | str:
    """An int; but data.key=value behind --steps, which argparse takes for one of them, as it is."""
    return word if "=" in word else int(word)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_intermixed_args(arguments)
    options.overrides += [word for word in options.steps if isinstance(word, str)]
    options.steps = [word for word in options.steps if isinstance(word, int)]
    own = {"net": import_made(options.net), "dataset": import_made(options.data)}
    own |= {"count": options.count, "sampler": options.sampler, "overrides": options.overrides}
    own |= {"guidance": guidance_of(options)}
    result = evaluate_run(options.run, options.steps, options.seed, options.device, **own)
    print(
        f"{options.run}: {result['data']} after {result['step']} training steps, {result['samples']} samples per column"
    )
    print(table(result))
    if "classifier_accuracy" in result:
        print("classifier accuracy: " + ", ".join(f"{k} {v:.4f}" for k, v in result["classifier_accuracy"].items()))
    print(f"written: {options.run}/evaluation.json, {options.run}/evaluation_*.png")
