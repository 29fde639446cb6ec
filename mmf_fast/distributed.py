"""The processes of a run: joins them, gathers values from all of them, and raises an error of one on all.

A process without a group is rank 0 of 1.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmf_fast.devices import choose_device

__all__ = ["agree", "gather", "join", "rank_and_count"]

_Result = TypeVar("_Result")


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
            error.agreed = True  # type: ignore[attr-defined]  # all ranks raise it, so that one of them may tell
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
