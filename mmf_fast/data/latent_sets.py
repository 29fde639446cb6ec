"""Latents of an autoencoder: a prepared set on disk, normalised, drawn from mean and deviation at every visit."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from mmf_fast.data.dataset import (
    Batch,
    Epochs,
    Identity,
    Split,
    SplitName,
    StoredSplit,
    coins,
    rank_part,
    row_noise,
    whole,
)
from mmf_fast.data.formats.latents import SD_SCALE
from mmf_fast.data.normalization import Normalization, contradiction
from mmf_fast.data.prepared import Manifest, PreparedSet, open_pair

__all__ = ["LatentDataset", "latents"]

_SPLIT_KEY = 2**64 - 1  # random keys are (seed, step); a split has this in place of the step, which no batch has


class LatentDataset:
    """x = (z - mean) / std, float32 (C, h, w), each channel by the statistics of the training set.

    z is the stored latent, or one drawn from the mean and the deviation that are stored, afresh at every visit. Its
    noise is a function of (seed, step, row of the global batch), so it is the same on any number of ranks.
    scale: x = scale * z instead, z being as the autoencoder gives it; None where the statistics do.
    flip: with probability 1/2 takes the latent of the mirrored image. Raises ValueError where the set has none.
    """

    def __init__(
        self, train: PreparedSet, validation: PreparedSet | None, scale: float | None, flip: bool = False, seed: int = 0
    ) -> None:
        facts = train.manifest.facts
        self.identity: Identity = {"path": train.manifest.identity, "validation": None, "verify": None}
        self._moments, self._views = facts["holds"] == "mean-std", 2 if facts["flipped"] else 1
        if flip and self._views == 1:
            raise ValueError(
                "latents: the set has no latents of mirrored images, and mirroring a latent is not the same; "
                "leave data.flip out"
            )
        channels, *rest = train.manifest.shape
        self.name, self.num_classes = "latents", train.manifest.num_classes
        self.shape: tuple[int, ...] = (channels // self._views // (2 if self._moments else 1), *rest)
        self.flip, self.seed = flip, seed
        self.normalization = _normalization(train.manifest, scale, self.shape[0])
        self._train = train
        self._splits: dict[SplitName, StoredSplit | None] = {
            "train": (train.samples, train.labels),
            "validation": None if validation is None else (validation.samples, validation.labels),
        }
        self._epochs = Epochs(self.name, train.manifest.count, seed)

    def batch(self, step: int, size: int, rank: int = 0, world_size: int = 1) -> Batch:
        part = rank_part(step, size, rank, world_size)
        rows = self._epochs.rows(step, size, rank, world_size)
        mirrored = coins(self.seed, step, size)[part] if self.flip else None
        x = self._drawn(self._train.samples[rows.numpy()], (self.seed, step), range(size)[part], mirrored)
        return x, None if self._train.labels is None else self._train.labels[rows]

    def to_latents(self, x: Tensor) -> Tensor:
        """What the autoencoder decodes: undoes the normalisation of x (n, C, h, w), such as a network draws."""
        return self.normalization.undo(x)

    def split(self, name: SplitName) -> Split:
        """One draw of every latent, the same for every seed."""
        samples, labels = whole(self, name, self._splits)
        return self._drawn(samples, (0, _SPLIT_KEY), range(len(samples)), None), labels

    def _drawn(self, stored: np.ndarray, key: tuple[int, int], rows: range, mirrored: Tensor | None) -> Tensor:
        """stored (n, channels, h, w) float16; rows: their rows in the global batch."""
        views = np.split(stored, self._views, axis=1)
        chosen = views[0]
        if mirrored is not None:
            chosen = np.where(mirrored.numpy()[:, None, None, None], views[1], views[0])
        if not self._moments:
            return torch.from_numpy(self.normalization.apply(chosen.astype(np.float32)))
        mean, std = np.split(chosen, 2, axis=1)
        z = row_noise(key, rows, mean.shape)
        z *= std
        z += mean
        return torch.from_numpy(self.normalization.apply(z))


def _normalization(manifest: Manifest, scale: float | None, channels: int) -> Normalization:
    """Normalises by the statistics of the manifest, or by `scale` alone; warns where the scale contradicts them."""
    stated, scaled_by = manifest.statistics, manifest.facts["scaled_by"]
    if scale is None:
        if stated is None:
            raise ValueError(
                "latents: the set was prepared without statistics, by an older version; prepare it again with "
                f"--overwrite, or pass data.scale={SD_SCALE} as was usual for the SD-VAE"
            )
        return Normalization(stated["mean"], stated["std"], scaled_by)
    alone = {"mean": [0.0] * channels, "std": [scaled_by / scale] * channels}
    if wrong := contradiction(alone, stated and stated["measured"]):
        warnings.warn(f"data.scale={scale}: {wrong}; leave data.scale out to use these", stacklevel=4)
    return Normalization(alone["mean"], alone["std"], scaled_by)


def latents(
    path: str,
    validation: str | None = None,
    scale: float | None = None,
    flip: bool = False,
    verify: bool = False,
    seed: int = 0,
) -> LatentDataset:
    """A prepared set of latents: the folder that mmf prepare wrote.

    validation: folder of another prepared set, the validation split; the statistics are those of the training set.
    scale: instead of the statistics in the manifest, one factor for the latents as the autoencoder gives them; what was
    scaled before it was stored is not scaled twice.  verify: compares all checksums first.
    seed: of the order of the training batches, the noise and the flips.
    Raises ValueError where a set is missing, damaged, or unlike the other, for a scale that is not positive, for flips
    the set cannot give, and for a negative seed.
    """
    if scale is not None and not scale > 0:
        raise ValueError(f"latents: scale is {scale}; it must be positive, or left out")
    return LatentDataset(*open_pair("latents", path, validation, verify), scale, flip, seed)
