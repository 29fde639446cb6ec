import hashlib

import numpy as np
import torch
from sklearn.datasets import load_digits

from mmf_fast.data import load


def pairs(x, y):
    """Multiset of (image, label), the image in the grey levels 0 .. 16 of the source."""
    levels = ((x + 1) * 8).round().to(torch.uint8).flatten(1).numpy()
    return sorted((row.tobytes(), int(label)) for row, label in zip(levels, y, strict=True))


def test_splits_are_a_partition_of_the_source():
    data, source = load("digits"), load_digits()
    (x, y), (x_val, y_val) = data.split("train"), data.split("validation")
    assert (len(x), len(x_val)) == (1437, 360)
    expected = [(row.astype(np.uint8).tobytes(), int(k)) for row, k in zip(source.data, source.target, strict=True)]
    assert pairs(torch.cat((x, x_val)), torch.cat((y, y_val))) == sorted(expected)
    assert (x.min(), x.max()) == (-1, 1)
    share = y_val.bincount(minlength=10) / (y.bincount(minlength=10) + y_val.bincount(minlength=10))
    torch.testing.assert_close(share, torch.full((10,), 0.2), atol=0.005, rtol=0)


def test_images_are_upright():
    x, y = load("digits").split("train")
    zero = x[y == 0].mean(0)[0]
    assert zero[3:5, 3:5].mean() < -0.5 < 0.2 < zero[0, 3:5].mean()  # a ring: dark inside, bright at the top
    seven = x[y == 7].mean(0)[0]
    assert seven[:2].mean() > seven[6:].mean()


def test_the_split_never_changes():
    """Figures of different machines and versions are comparable only on the same split."""
    digest = hashlib.sha256(load("digits").split("validation")[0].numpy().tobytes()).hexdigest()
    assert digest.startswith("075783dfacee9b7d")
    assert torch.equal(load("digits", seed=5).split("validation")[0], load("digits").split("validation")[0])
