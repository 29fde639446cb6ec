"""Images: a prepared set on disk, or made ones of the same format for a machine without data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmf_fast.data.augment import check_probability, transforms, warp
from mmf_fast.data.dataset import (
    Batch,
    Epochs,
    Identity,
    Split,
    SplitName,
    StoredSplit,
    check_seed,
    coins,
    rank_part,
    whole,
)
from mmf_fast.data.prepared import open_pair

__all__ = ["ImageDataset", "images", "synthetic"]


class ImageDataset:
    """Images kept as uint8 (N, C, H, W), of which a batch is made as they are: they stand for image / 127.5 - 1, which
    a split, and a batch that is augmented, is made of (float32 in [-1, 1]).

    train, validation: images and labels (N,) int64 or None.
    flip: every time a sample is drawn, it is mirrored left to right with probability 1/2; a split never is.
    augment: probability of each of the transforms of augment.py, drawn anew likewise; the network is not told of them.
    source: the identity of the prepared set, wherever it lies.
    Raises ValueError for a negative seed, or a probability that is none.
    """

    def __init__(
        self,
        name: str,
        train: StoredSplit,
        validation: StoredSplit | None = None,
        num_classes: int = 0,
        flip: bool = False,
        augment: float = 0.0,
        seed: int = 0,
        source: str | None = None,
    ) -> None:
        self.identity: Identity = {"path": source, "validation": None, "verify": None}
        self.name, self.shape, self.num_classes = name, tuple(train[0].shape[1:]), num_classes
        check_probability(augment)
        self.flip, self.augment, self.seed = flip, augment, seed
        self._splits: dict[SplitName, StoredSplit | None] = {"train": train, "validation": validation}
        self._train = train
        self._epochs = Epochs(name, len(train[0]), seed)

    def batch(self, step: int, size: int, rank: int = 0, world_size: int = 1) -> Batch:
        samples, labels = self._train
        part = rank_part(step, size, rank, world_size)
        rows = self._epochs.rows(step, size, rank, world_size)
        images = samples[rows.numpy()]
        if self.flip:
            mirrored = np.flatnonzero(coins(self.seed, step, size)[part])
            images[mirrored] = images[mirrored][..., ::-1]
        x = torch.from_numpy(images)
        if self.augment:
            x = warp(_centred(images), transforms(self.seed, step, size, self.augment, self.shape)[part])
        return x, None if labels is None else labels[rows]

    def split(self, name: SplitName) -> Split:
        samples, labels = whole(self, name, self._splits)
        return _centred(samples), labels


def images(
    path: str,
    validation: str | None = None,
    flip: bool = False,
    augment: float = 0.0,
    verify: bool = False,
    seed: int = 0,
) -> ImageDataset:
    """A prepared set of images: the folder that mmf prepare wrote.

    validation: folder of another prepared set, the validation split.  verify: compares all checksums first.
    flip, augment: see ImageDataset.  seed: of the order of the training batches, the flips and the augmentation.
    Raises ValueError where a set is missing, damaged, or unlike the other, and for a negative seed.
    """
    train, other = open_pair("images", path, validation, verify)
    held = None if other is None else (other.samples, other.labels)
    stored, known = (train.samples, train.labels), train.manifest
    return ImageDataset("images", stored, held, known.num_classes, flip, augment, seed, known.identity)


def synthetic(
    shape: tuple[int, int, int] = (3, 64, 64),
    num_classes: int = 1000,
    count: int = 4096,
    path: str | None = None,
    validation: str | None = None,
    flip: bool = False,
    augment: float = 0.0,
    verify: bool = False,
    seed: int = 0,
) -> ImageDataset:
    """`count` made images for a machine without data: a coloured wave per class, shifted at random, and noise.

    num_classes: 0 for images without labels.  seed: of the images, their order and the flips.
    path, validation, verify: not used; so data=synthetic can replace data.name=images in any configuration.
    Raises ValueError for numbers that are not positive, and for a negative seed.
    """
    check_seed(seed)
    if min(shape) < 1 or count < 1 or num_classes < 0:
        raise ValueError(f"synthetic: {count} images of shape {shape} in {num_classes} classes; give positive numbers")
    train, held = _made(shape, num_classes, count, seed, 0), _made(shape, num_classes, max(1, count // 8), seed, 1)
    return ImageDataset("synthetic", train, held, num_classes, flip, augment, seed)


def _centred(images: np.ndarray) -> Tensor:
    """uint8 0 .. 255 -> float32 -1 .. 1, in NumPy on this thread: torch's threads are busy with the network."""
    x = images.astype(np.float32)
    x /= np.float32(127.5)
    x -= np.float32(1)
    return torch.from_numpy(x)


def _made(shape: tuple[int, int, int], num_classes: int, count: int, seed: int, part: int) -> StoredSplit:
    """127 + 90 colour cos(2 pi (f_y y + f_x x + shift)) + noise: frequencies and colour are those of the class."""
    channels, height, width = shape
    classes = np.random.default_rng([seed, 2])
    frequency = classes.integers(0, 5, (max(1, num_classes), 2))
    colour = classes.uniform(-1, 1, (max(1, num_classes), channels))
    samples = np.random.default_rng([seed, 3, part + 1])
    labels = samples.integers(max(1, num_classes), size=count)
    shift = samples.random(count)
    result = np.empty((count, *shape), np.uint8)
    y, x = np.arange(height)[:, None] / height, np.arange(width) / width
    for i, label in enumerate(labels):
        wave = np.cos(2 * np.pi * (frequency[label, 0] * y + frequency[label, 1] * x + shift[i]))
        noise = samples.integers(-37, 38, shape, np.int8)
        result[i] = 127 + 90 * colour[label, :, None, None] * wave + noise
    return result, torch.from_numpy(labels) if num_classes else None
