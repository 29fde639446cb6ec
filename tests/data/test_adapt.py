"""Data of one's own: every kind gives the batches of a Dataset."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.datapipes.iter import IterableWrapper

from mmf_fast.data import ArrayDataset, as_dataset, load, register_dataset

X, Y = torch.arange(24.0).view(12, 2), torch.arange(12)


class Pairs(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Any:
        return X[i].numpy(), i


@pytest.mark.parametrize("source", [(X, Y), TensorDataset(X, Y), Pairs()], ids=["tensors", "dataset", "arrays"])
def test_samples_by_index_are_shuffled_anew_in_each_epoch_and_shared_by_the_ranks(source: Any) -> None:
    dataset = as_dataset(source, seed=3)
    reference = ArrayDataset("it", {"train": (X, Y)}, seed=3)
    assert dataset.shape == (2,)
    for step in range(5):
        for rank in range(2):
            x, y = dataset.batch(step, 6, rank, 2)
            want_x, want_y = reference.batch(step, 6, rank, 2)
            assert want_y is not None and y is not None
            assert torch.equal(x, want_x) and torch.equal(y, want_y)


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (torch.tensor([0, 4, 1] * 4), 5),
        (np.array([0, 4, 1] * 4, np.uint8), 5),
        (torch.tensor([-1, 4, 1] * 4), 0),
        (torch.rand(12), 0),
        (torch.ones(12, 2, dtype=torch.long), 0),
        (torch.ones(12, dtype=torch.bool), 0),
        ({"y": Y}, 0),
        (None, 0),
    ],
)
def test_integers_from_0_are_classes(y: Any, classes: int) -> None:
    assert as_dataset(X if y is None else (X, y)).num_classes == classes


def test_conditions_by_name_follow_their_samples() -> None:
    dataset = as_dataset((X, {"text": 10.0 * Y, "y": Y}))
    for step in range(4):
        x, cond = dataset.batch(step, 5)
        assert (
            isinstance(cond, dict) and torch.equal(x[:, 0], 2.0 * cond["y"]) and torch.equal(cond["text"], x[:, 0] * 5)
        )


def test_x_alone_has_no_conditions() -> None:
    for source in (X, TensorDataset(X), DataLoader(X, batch_size=4)):  # type: ignore[arg-type]
        x, y = as_dataset(source).batch(0, 4)
        assert x.shape == (4, 2) and y is None


def test_an_iterable_is_gone_through_again_and_a_step_is_found_again() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    dataset = as_dataset(loader)
    for step in (0, 0, 1, 2, 3, 7, 4, 0):  # also backwards, which begins again
        x, y = dataset.batch(step, 4)
        assert torch.equal(x, X[4 * (step % 3) :][:4]) and y is not None and torch.equal(y, Y[4 * (step % 3) :][:4])


def test_each_process_iterates_over_its_own_batches_and_epochs_are_shuffled_by_their_number() -> None:
    def dataset(rank: int) -> Any:
        sampler = DistributedSampler(TensorDataset(X, Y), num_replicas=2, rank=rank, seed=1)
        return as_dataset(DataLoader(TensorDataset(X, Y), batch_size=3, sampler=sampler))

    ranks = [dataset(rank) for rank in range(2)]
    epochs = [
        [int(y) for step in (2 * e, 2 * e + 1) for d in ranks for y in d.batch(step, 6, 0, 2)[1]] for e in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12)) and epochs[0] != epochs[1]
    again = [int(y) for step in (2, 3) for y in dataset(0).batch(step, 6, 0, 2)[1]]  # as after a resumption
    assert again == [*epochs[1][:3], *epochs[1][6:9]]


class HuggingFace:
    """As datasets.Dataset is: its `batch` groups rows into lists, its `shape` is (rows, columns), a row is a dict."""

    shape, split = (12, 2), "train"

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]

    def batch(self, batch_size: int) -> Any:
        raise AssertionError("is not the batch of a training stream")


def test_a_batch_alone_makes_no_dataset_of_ours() -> None:
    """torch's DataPipes and the datasets of Hugging Face have one too, which groups rows."""
    x, y = as_dataset(HuggingFace([(X[i], i) for i in range(12)])).batch(0, 12)
    assert isinstance(y, Tensor) and torch.equal(x, X[y]) and not torch.equal(x, X)
    assert torch.equal(as_dataset(IterableWrapper(X.split(4))).batch(1, 4)[0], X[4:8])
    ours = ArrayDataset("it", {"train": (X, Y)})
    assert as_dataset(ours) is ours
    with pytest.raises(ValueError, match="data is a SimpleNamespace without name, num_classes, identity: give it"):
        as_dataset(SimpleNamespace(batch=ours.batch, shape=(2,)))


@pytest.mark.parametrize("image", [X[0], object()], ids=["tensor", "picture"])
def test_rows_of_named_columns_are_refused_with_what_to_write(image: Any) -> None:
    line = (
        r"data gave a dict of 'image', 'label': a sample is x, .*; wrap the data in a torch Dataset whose __getitem__ "
        r"returns row\['image'\], row\['label'\] \(a DataLoader: collate_fn\)$"
    )
    named = HuggingFace([{"image": image, "label": 3}] * 12)
    for source in (named, iter([named[0]])):  # the latter as load_dataset(streaming=True) gives them
        with pytest.raises(ValueError, match=line):
            as_dataset(source)
    with pytest.raises(ValueError, match="data is a dict of 'train', 'test': give one of its entries"):
        as_dataset({"train": named, "test": named})


def test_batches_that_do_not_fit_are_refused() -> None:
    dataset = as_dataset(DataLoader(TensorDataset(X, Y), batch_size=5))
    with pytest.raises(ValueError, match="batch of 5 at step 0, but 8 samples on 2 processes are 4 each"):
        dataset.batch(0, 8, 0, 2)
    with pytest.raises(ValueError, match="batch of 2 at step 2.*drop_last"):
        dataset.batch(2, 5)


class Endless(IterableDataset):
    """With a length, as torch allows; it inherits __getitem__."""

    def __iter__(self) -> Any:
        return iter(X.split(2))

    def __len__(self) -> int:
        return 2


def test_an_iterable_dataset_with_a_length_is_gone_through() -> None:
    assert torch.equal(as_dataset(Endless()).batch(1, 2)[0], X[2:4])


def test_arrays_are_taken_as_tensors_are() -> None:
    x, y = as_dataset((X.numpy(), np.arange(len(X)))).batch(0, 4)
    assert isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, X[y])


@pytest.mark.parametrize("kind", ["shuffle", "weighted", "batch_sampler"])
def test_a_loader_draws_anew_in_each_epoch_and_on_each_rank_and_again_alike(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on sees what it would have seen; ranks whose loaders are alike see different samples."""
    rows = TensorDataset(torch.arange(64.0)[:, None])

    def loader() -> DataLoader:
        if kind == "shuffle":
            return DataLoader(rows, batch_size=8, shuffle=True)
        if kind == "weighted":
            return DataLoader(rows, batch_size=8, sampler=WeightedRandomSampler([1.0] * 64, 64))
        return DataLoader(rows, batch_sampler=BatchSampler(RandomSampler(rows), 8, drop_last=True))

    def seen(rank: int, first: int = 0) -> list[list[float]]:
        monkeypatch.setenv("RANK", str(rank))
        torch.manual_seed(len(found))  # it does not matter
        dataset = as_dataset(loader())
        return [dataset.batch(step, 16, rank, 2)[0][:, 0].tolist() for step in range(first, 12)]

    found: list[Any] = []
    for rank, first in ((0, 0), (0, 9), (1, 0)):
        found.append(seen(rank, first))
    assert found[0][9:] == found[1]
    assert found[0][:8] != found[0][8:] and all(one != other for one, other in zip(found[0], found[2], strict=True))


def test_a_generator_serves_once() -> None:
    def batches() -> Iterator[Tensor]:
        yield from X.split(4)

    dataset = as_dataset(batches())
    assert torch.equal(dataset.batch(0, 4)[0], X[:4]) and torch.equal(dataset.batch(1, 4)[0], X[4:8])
    with pytest.raises(ValueError, match="cannot be gone through again"):
        dataset.batch(0, 4)
    with pytest.raises(ValueError, match="ended after 3 batches"):
        dataset.batch(3, 4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "data is a int: give a tensor"),
        ([{"image": X}], "a sample is x"),
        (np.zeros(3), "gave single numbers"),
        ([], "list has no samples"),
        (torch.zeros(0, 2), "Tensor has no samples"),
        ((X, torch.zeros(2 * len(X))), "y is .* rows, x has .* rows: give a tensor with a row for each sample"),
        ((X, {"w": X[1:]}), "w is .* rows, x has"),
        ((X, [0] * len(X)), "beside x there is a list: give labels as a tensor"),
        ((X, {"w": "text"}), "w is a str, x has"),
        ([(object(), 1)], "a sample holds object, int, which makes no batch .*PILToTensor"),
    ],
)
def test_what_is_no_data_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_dataset(source)


def test_a_registered_dataset_is_loaded_by_name() -> None:
    def rows(count: int) -> Tensor:
        return X[:count]

    register_dataset("rows_of_test_adapt", rows)
    assert load("rows_of_test_adapt", count=5).batch(0, 5)[0].shape == (5, 2)
    with pytest.raises(ValueError, match="needs the option 'count'"):
        load("rows_of_test_adapt")
