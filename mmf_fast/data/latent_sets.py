"""Latents of an autoencoder: a prepared set on disk, drawn afresh from mean and standard deviation at every visit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmf_fast.data.dataset import Batch, Epochs, Identity, SplitName, StoredSplit, coins, rank_part, row_noise, whole
from mmf_fast.data.formats.latents import SD_SCALE
from mmf_fast.data.prepared import PreparedSet, open_pair

__all__ = ["LatentDataset", "latents"]

_SPLIT_KEY = 2**64 - 1  # stands where the step stands in the random key of a training batch


class LatentDataset:
    """x = scale * (mean + std * noise), float32 (C, h, w); where the set holds drawn latents, scale * latent.

    The noise of a row of the global batch is a function of (seed, step, row), so it is the same on any number of ranks.
    flip: with probability 1/2 takes the latent of the mirrored image. Raises ValueError where the set has none.
    """

    def __init__(
        self, train: PreparedSet, validation: PreparedSet | None, scale: float, flip: bool = False, seed: int = 0
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
        self.flip, self.seed, self.scale = flip, seed, scale / facts["scaled_by"]
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

    def split(self, name: SplitName) -> Batch:
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
            return torch.from_numpy(chosen.astype(np.float32) * np.float32(self.scale))
        mean, std = np.split(chosen, 2, axis=1)
        x = row_noise(key, rows, mean.shape)
        x *= std
        x += mean
        x *= np.float32(self.scale)
        return torch.from_numpy(x)


def latents(
    path: str,
    validation: str | None = None,
    scale: float = SD_SCALE,
    flip: bool = False,
    verify: bool = False,
    seed: int = 0,
) -> LatentDataset:
    """A prepared set of latents: the folder that mmf prepare wrote.

    validation: folder of another prepared set, the validation split.  scale: of the latents as the autoencoder gives
    them; what was scaled before it was stored is not scaled twice.  verify: compares all checksums first.
    seed: of the order of the training batches, the noise and the flips.
    Raises ValueError where a set is missing, damaged, or unlike the other, for a scale that is not positive, for flips
    the set cannot give, and for a negative seed.
    """
    if not scale > 0:
        raise ValueError(f"latents: scale is {scale}; it must be positive, {SD_SCALE} for the SD-VAE")
    return LatentDataset(*open_pair("latents", path, validation, verify), scale, flip, seed)
