"""The processes of a run: joins them, gathers values from all of them, and raises an error of one on all.

A process without a group is rank 0 of 1.
"""

from __future__ import annotations

import atexit
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmf_fast.devices import choose_device

__all__ = ["RankError", "agree", "ending_together", "gather", "join", "rank_and_count"]

_Result = TypeVar("_Result")

# Seconds between the last collective and the interpreter's end. A thread of gloo frees the tensors of a collective, for
# which it needs the interpreter's lock: one that asks for it too late aborts the process (pytorch issue 190489).
# destroy_process_group() does not wait for these threads while anything, as FSDP2 does, holds the group.
_LET_GO = 0.2


def join(name: str) -> torch.device:
    """Joins the processes of the launcher, or starts a group of one, and takes the device of that name; on CUDA this
    rank's. gloo serves CPUs, nccl CUDA. Raises ValueError for a device that is not here."""
    device = choose_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if backend == "gloo":
            atexit.register(time.sleep, _LET_GO)
    return device


def rank_and_count() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on each; nobody goes on before all have come."""
    found = [value]
    if dist.is_initialized():
        found *= dist.get_world_size()
        dist.all_gather_object(found, value)
    return found


def agree(work: Callable[[], _Result]) -> _Result:
    """work() on every rank. An exception of one is raised on all of them, so that none waits: of its own kind where
    that can be sent, else a RuntimeError that names it."""
    result: Any = None
    problem: Exception | None = None
    try:
        result = work()
    except Exception as raised:
        problem = raised
    for rank, sent in enumerate(gather(problem and _sendable(problem))):
        if sent is not None:
            error = problem if problem is not None else _received(rank, *sent)
            error.told = rank_and_count()[0] != rank  # type: ignore[attr-defined]  # all ranks raise it, and one tells it
            raise error
    return result


def _sendable(error: Exception) -> tuple[bytes | None, str]:
    """The exception, if another process can make it again, and its kind and text."""
    text = f"{type(error).__name__}: {error}"
    try:
        sent = pickle.dumps(error)
        pickle.loads(sent)
    except Exception:  # of all kinds: what an exception holds, or how it is made, may be anything
        return None, text
    return sent, text


def _received(rank: int, sent: bytes | None, text: str) -> Exception:
    return RuntimeError(f"rank {rank}: {text}") if sent is None else pickle.loads(sent)


# ---- what fails on one rank while the others wait for it in a collective ---------------------------------------------

_FAILED, _SEEN = "mmf_fast/failed", "mmf_fast/seen"  # keys of the store by which the ranks met
_LOOK_EVERY, _WAIT = 0.5, 5.0  # seconds


class RankError(OSError):
    """What ended one of several ranks, and so all of them; the message is one line: the rank and the cause."""


@contextmanager
def ending_together(log: Callable[[str], Any] = lambda message: None) -> Iterator[None]:
    """Within the block, what one of several ranks raises ends all of them, within seconds and wherever they are. That
    rank raises RankError; the others hand its message to `log` and end with status 1.

    They may wait for the rank in a collective, which no exception can leave, and no further collective can reach them.
    So the message is left in the store by which the ranks met, where a thread of each looks for it.
    """
    if rank_and_count()[1] == 1:
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over, log), name="watch", daemon=True)
    watch.start()
    try:
        yield
    except Exception as error:
        over.set()  # this rank ends by itself
        if hasattr(error, "told"):  # all ranks raise it
            raise
        raise _left_for_others(error) from error
    finally:
        over.set()
        watch.join()


def _left_for_others(error: Exception) -> RankError:
    """What to raise for it: of several errors the first counts, as others may follow from it."""
    store: Any = dist.distributed_c10d._get_default_store()
    own = message = f"rank {rank_and_count()[0]}: {type(error).__name__}: {' '.join(str(error).split())}"
    with suppress(Exception):  # the store is gone with the rank that kept it
        message = store.compare_set(_FAILED, "", own).decode()
    _wait_until_seen(store)
    result = RankError(message)
    result.told = message != own  # type: ignore[attr-defined]
    return result


def _watch(over: threading.Event, log: Callable[[str], Any]) -> None:
    # A connection of its own: on the common one it would wait where the main thread does.
    store: Any = dist.distributed_c10d._get_default_store()
    store = store.clone()
    while not over.wait(_LOOK_EVERY):
        try:
            message = store.get(_FAILED).decode() if store.check([_FAILED]) else ""
        except Exception:  # it is gone with the rank that kept it
            return
        if message and not over.is_set():
            log(message)
            _wait_until_seen(store)
            os._exit(1)


def _wait_until_seen(store: Any) -> None:
    """By all ranks that live: the store goes with the first of them."""
    end = time.monotonic() + _WAIT
    with suppress(Exception):
        store.add(_SEEN, 1)
        while store.add(_SEEN, 0) < rank_and_count()[1] and time.monotonic() < end:
            time.sleep(_LOOK_EVERY / 5)
    if rank_and_count()[0] == 0:
        time.sleep(_LOOK_EVERY)
