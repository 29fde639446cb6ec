"""Handwritten digits: the 1,797 real 8x8 images bundled with scikit-learn (UCI, Alpaydin and Kaynak, 1998)."""

from __future__ import annotations

import torch

from mmf_fast.data.dataset import ArrayDataset, Split, SplitName

__all__ = ["digits"]


def digits(seed: int = 0) -> ArrayDataset:
    """1,437 training and 360 validation images (1, 8, 8) in [-1, 1], 10 classes.

    seed: order of the training batches. The split is stratified and does not depend on it.
    Raises ValueError for a negative seed.
    """
    from sklearn.datasets import load_digits  # here, for its import takes a second or more
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).to(torch.float32).reshape(-1, 1, 8, 8) / 8 - 1  # grey levels 0 .. 16
    y = torch.from_numpy(labels).to(torch.int64)
    train, validation = train_test_split(range(len(y)), test_size=0.2, stratify=labels, random_state=0)
    splits: dict[SplitName, Split] = {"train": (x[train], y[train]), "validation": (x[validation], y[validation])}
    return ArrayDataset("digits", splits, num_classes=10, seed=seed)
