"""Datasets by name. None is downloaded, and every batch is a pure function of (seed, step, size).

    dataset = load("digits", seed=0)
    x, y = dataset.batch(step=17, size=128)         x (128, 1, 8, 8) float32 in [-1, 1], y (128,) int64
    x, y = dataset.split("validation")              the whole split

    dataset = load("images", path="data/cifar10")   a folder that mmf prepare SRC OUT wrote
    x, y = dataset.batch(17, 1024, rank=3, world_size=8)    rows 384 .. 511 of the same global batch

To add a dataset: a function whose typed keyword arguments are its options and that returns a `Dataset`, or what
`as_dataset` takes; its name in a configuration is "package.module:function", or what `register_dataset` was given.
"""

from __future__ import annotations

from typing import Any

from mmf_fast.data.adapt import as_dataset
from mmf_fast.data.dataset import ArrayDataset, Batch, Dataset, conditions_of
from mmf_fast.data.digits import digits
from mmf_fast.data.formats import DataError
from mmf_fast.data.image_sets import images, synthetic
from mmf_fast.data.latent_sets import latents
from mmf_fast.data.prefetch import Prefetcher
from mmf_fast.data.toy2d import checkerboard, circles, eight_gaussians, two_moons
from mmf_fast.registry import Registry

__all__ = [
    "DATASETS",
    "ArrayDataset",
    "Batch",
    "DataError",
    "Dataset",
    "Prefetcher",
    "as_dataset",
    "conditions_of",
    "load",
    "register_dataset",
]

DATASETS: Registry[Any] = Registry(
    "dataset",
    "option",
    "data",
    {
        "two_moons": two_moons,
        "circles": circles,
        "checkerboard": checkerboard,
        "eight_gaussians": eight_gaussians,
        "digits": digits,
        "images": images,
        "latents": latents,
        "synthetic": synthetic,
    },
)


def load(name: str, **options: Any) -> Dataset:
    """The dataset called `name`, with the options of its function in `DATASETS` or at the import path.

    Raises ValueError for an unknown name, an unknown or a missing option, or a value the dataset refuses.
    """
    return as_dataset(DATASETS.build(name, **options))


register_dataset = DATASETS.register  # register_dataset("faces", function): data={"name": "faces", ...}
