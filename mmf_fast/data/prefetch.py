"""Batches made ahead, in a thread of their own.

    with Prefetcher(dataset, size=256, first=step, rank=rank, world_size=world_size) as batches:
        for step, (x, y) in batches:
            ...

Gathering and converting let go of Python's global lock, so that training goes on meanwhile.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from mmf_fast.data.dataset import Batch, Dataset

__all__ = ["Prefetcher"]


class Prefetcher:
    """Yields (step, dataset.batch(step, size, rank, world_size)) for step = first, first + 1, ... before `last`.

    depth: batches that wait at most, beside the one being made.  last: None for an endless stream.
    then: applied to each batch in the thread, for instance to pin its memory.
    An exception of the dataset is raised where its batch would have been. Leaving the block ends the thread.
    """

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        first: int = 0,
        last: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        depth: int = 2,
        then: Callable[[Batch], Batch] | None = None,
    ) -> None:
        if depth < 1:
            raise ValueError(f"prefetch depth is {depth}: it must be at least 1")
        self._make = lambda step: dataset.batch(step, size, rank, world_size)
        self._then = then
        self._steps = itertools.count(first) if last is None else range(first, last)
        self._ready: queue.Queue[tuple[int, Batch] | BaseException | None] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._taken = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._start()
        return self

    def _start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        while self._thread.is_alive():  # it may wait for room in the queue
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """Can be called once, since batches are not kept. Raises RuntimeError the second time."""
        if self._taken:
            raise RuntimeError("the batches of a Prefetcher can be gone through once: make another from the step on")
        self._taken = True
        self._start()
        return self._batches()

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        while (ready := self._ready.get()) is not None:
            if isinstance(ready, BaseException):
                raise ready
            yield ready

    def _run(self) -> None:
        try:
            for step in self._steps:
                batch = self._make(step)
                if self._stopped.is_set():
                    return
                self._ready.put((step, batch if self._then is None else self._then(batch)))
                if self._stopped.is_set():
                    return
        except BaseException as error:  # the error is raised in the thread that asked for the batch
            self._ready.put(error)
        else:
            self._ready.put(None)
