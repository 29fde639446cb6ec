import pytest
import torch

from mmf_fast.data import DATASETS, ArrayDataset, load


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
def test_protocol(name):
    data = load(name, seed=1)
    assert data.name == name
    for x, y in (data.batch(0, 4), data.split("train"), data.split("validation")):
        assert x.dtype == torch.float32 and tuple(x.shape[1:]) == data.shape
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
        ("zzz", {}, "unknown dataset 'zzz'; valid are two_moons, circles, checkerboard, eight_gaussians, digits"),
        ("circles", {"facter": 0.3}, "dataset 'circles' has no option 'facter'; did you mean 'factor'?"),
        ("digits", {"seed": -2}, "data seed is -2: it must not be negative"),
    ],
)
def test_errors_name_the_thing_and_the_way_out(name, options, message):
    with pytest.raises(ValueError) as error:
        load(name, **options)
    assert str(error.value) == message
