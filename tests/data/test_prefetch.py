import threading
import time

import pytest
import torch

from mmf_fast.data import Prefetcher, load


class Counting:
    """A dataset whose batch is its arguments, and which remembers what it was asked for."""

    def __init__(self, fails_at=None):
        self.asked = []
        self.fails_at = fails_at

    def batch(self, step, size, rank=0, world_size=1):
        if step == self.fails_at:
            raise OSError("disk gone")
        self.asked.append(step)
        return torch.tensor([step, size, rank, world_size]), None


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_come_in_order_and_are_those_of_the_dataset():
    data = load("digits", seed=1)
    with Prefetcher(data, 16, first=3, last=9, rank=1, world_size=2) as batches:
        found = list(batches)
    assert [step for step, _ in found] == list(range(3, 9))
    for step, (x, y) in found:
        expected = data.batch(step, 16, 1, 2)
        assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
    assert not threads()


@pytest.mark.parametrize("depth", [1, 3])
def test_it_runs_ahead_by_its_depth_and_no_further(depth):
    data = Counting()
    with Prefetcher(data, 4, depth=depth) as batches:
        iterator = iter(batches)
        for step in range(5):
            assert next(iterator)[0] == step
        deadline = time.monotonic() + 5
        while len(data.asked) < 5 + depth + 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(data.asked) == 5 + depth + 1  # those in the queue, and one that waits for room
    assert not threads()


def test_an_exception_arrives_in_its_place():
    with Prefetcher(Counting(fails_at=3), 4) as batches:
        steps = []
        with pytest.raises(OSError, match="disk gone"):
            for step, _ in batches:
                steps.append(step)
    assert steps == [0, 1, 2] and not threads()


def test_an_exception_of_the_training_ends_the_thread():
    with pytest.raises(KeyError), Prefetcher(Counting(), 4) as batches:
        next(iter(batches))
        raise KeyError
    assert not threads()


def test_the_engine_may_pin_in_the_thread():
    where = []

    def then(batch):
        where.append(threading.current_thread().name)
        return batch[0] + 1, None

    with Prefetcher(Counting(), 4, last=2, then=then) as batches:
        assert [batch[0].tolist() for _, batch in batches] == [[1, 5, 1, 2], [2, 5, 1, 2]]
    assert where == ["prefetch"] * 2


def test_depth_is_positive():
    with pytest.raises(ValueError, match="prefetch depth is 0"):
        Prefetcher(Counting(), 4, depth=0)


def test_it_starts_by_itself_and_serves_once() -> None:
    batches = Prefetcher(load("two_moons"), size=4, last=3)
    assert [step for step, _ in batches] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="once: make another"):
        iter(batches)
