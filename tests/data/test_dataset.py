import numpy as np
import pytest
import torch
from support.archives import edm, edm2, pictures, write_zip

from mmf_fast.data import DATASETS, ArrayDataset, load
from mmf_fast.data.dataset import Epochs
from mmf_fast.data.prepare import prepare


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """{dataset: options it needs}: prepared sets of 24 images and of 24 latents."""
    folder = tmp_path_factory.mktemp("sets")
    labels = [i % 5 for i in range(24)]
    latents = np.random.default_rng(0).uniform(0.5, 1, (24, 8, 4, 4)).astype(np.float32)
    prepare(write_zip(folder / "images.zip", edm(pictures(24, 8), labels)), folder / "images")
    prepare(write_zip(folder / "latents.zip", edm2(latents, labels)), folder / "latents")
    return {
        "images": {"path": str(folder / "images"), "validation": str(folder / "images"), "flip": True},
        "latents": {"path": str(folder / "latents"), "validation": str(folder / "latents")},
        "synthetic": {"shape": (3, 8, 8), "num_classes": 4, "count": 30, "flip": True},
    }


def counting(n, seed=0):
    """A dataset whose sample i is the number i with label -i."""
    x = torch.arange(n, dtype=torch.float32)[:, None]
    return ArrayDataset("counting", {"train": (x, -x[:, 0].long()), "validation": (x, None)}, num_classes=1, seed=seed)


@pytest.mark.parametrize(("n", "size"), [(10, 3), (10, 5), (10, 10), (7, 6)])
def test_every_epoch_visits_every_sample_once(n, size):
    data = counting(n)
    stream = torch.cat([data.batch(step, size)[0][:, 0] for step in range(6 * n)])
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    assert len(epochs) >= 6
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(n, dtype=torch.float32).expand_as(epochs))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1  # in another order each


def test_labels_stay_with_their_samples():
    x, y = counting(20).batch(step=7, size=9)
    assert torch.equal(y, -x[:, 0].long())


def test_a_resumed_stream_goes_on_exactly():
    whole, resumed = counting(11, seed=2), counting(11, seed=2)
    before = [whole.batch(step, 4)[0] for step in range(12)]
    assert all(torch.equal(resumed.batch(step, 4)[0], before[step]) for step in (11, 5, 8))
    other = [counting(11, seed=3).batch(step, 4)[0] for step in range(12)]
    assert not torch.equal(torch.cat(before), torch.cat(other))


@pytest.mark.parametrize(
    ("step", "size", "message"), [(0, 12, "use at most 11"), (-1, 3, "step"), (0, 0, "batch size")]
)
def test_refused_batches(step, size, message):
    with pytest.raises(ValueError, match=message):
        counting(11).batch(step, size)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_ranks_share_one_global_batch(name, world_size, options):
    """At any step, so also across the end of an epoch: the parts of the ranks are the batch of one process."""
    data, other = (load(name, seed=3, **options.get(name, {})) for _ in range(2))
    for step in (0, 1, 2, 7):
        x, y = data.batch(step, 12)
        parts = [other.batch(step, 12, rank, world_size) for rank in range(world_size)]
        assert all(len(part[0]) == 12 // world_size for part in parts)
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert y is None or torch.equal(torch.cat([part[1] for part in parts]), y)


@pytest.mark.parametrize(
    ("size", "rank", "world_size", "message"),
    [
        (12, 4, 4, r"rank is 4: it must lie in 0 \.\. 3"),
        (12, -1, 4, "rank is -1"),
        (12, 0, 0, "rank is 0"),
        (10, 0, 4, "batch size 10 does not divide among 4 ranks; use 8"),
        (2, 0, 4, "batch size 2 does not divide among 4 ranks; use 4"),
        (100, 0, 100, "batch size 100 exceeds the 24 training samples of images; use at most 24"),
    ],
)
def test_ranks_that_do_not_fit(size, rank, world_size, message, options):
    with pytest.raises(ValueError, match=message):
        load("images", **options["images"]).batch(0, size, rank, world_size)


def test_epochs_of_imagenet():
    """1.28 million: an epoch is a permutation, and batches across its end hold the last and then the first samples."""
    count = 1_281_167
    epochs = Epochs("imagenet", count, seed=0)
    one, two = epochs.rows(0, count), epochs.rows(1, count)
    for epoch in (one, two):
        assert torch.equal(epoch.sort().values, torch.arange(count))
    assert (one == two).float().mean() < 1e-3
    stream = torch.cat([one, two])
    for step in (0, 1250, 1251, 1252, 2501):
        assert torch.equal(epochs.rows(step, 1024), stream[step * 1024 : (step + 1) * 1024])
        assert torch.equal(epochs.rows(step, 1024, 3, 4), stream[step * 1024 + 768 : (step + 1) * 1024])  # the last


def test_an_epoch_is_permuted_once(monkeypatch):
    epochs, made = Epochs("some", 1000, seed=0), []
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: made.append(key) or real(key))
    for step in range(100):
        epochs.rows(step, 30, rank=step % 3, world_size=3)
    assert made == [[0, 0], [0, 1], [0, 2]]


@pytest.mark.parametrize("name", DATASETS)
def test_protocol(name, options):
    data = load(name, seed=1, **options.get(name, {}))
    assert data.name == name
    stored = torch.uint8 if name in ("images", "synthetic") else torch.float32
    for i, (x, y) in enumerate((data.batch(0, 4), data.split("train"), data.split("validation"))):
        assert x.dtype == (torch.float32 if i else stored) and tuple(x.shape[1:]) == data.shape
        assert (
            y is None
            if data.num_classes == 0
            else (y.dtype == torch.int64 and 0 <= y.min() <= y.max() < data.num_classes)
        )
    with pytest.raises(ValueError, match="unknown split 'test'; valid are train, validation"):
        data.split("test")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("two_moon", {}, "unknown dataset 'two_moon'; did you mean 'two_moons'?"),
        ("zzz", {}, "unknown dataset 'zzz'; valid are {valid}"),
        ("circles", {"facter": 0.3}, "dataset 'circles' has no option 'facter'; did you mean 'factor'?"),
        ("digits", {"seed": -2}, "data seed is -2: it must not be negative"),
    ],
)
def test_errors_name_the_thing_and_the_way_out(name, options, message):
    with pytest.raises(ValueError) as error:
        load(name, **options)
    assert str(error.value) == message.format(valid=", ".join(DATASETS))  # other tests may have registered some
