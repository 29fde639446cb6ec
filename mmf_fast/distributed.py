"""Collective helpers for the processes of a run. A process without a group is rank 0 of 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["agree", "gather", "rank_and_count"]

_Result = TypeVar("_Result")


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
    """work() on every rank. An OSError or ValueError of one is raised on all of them, so that none waits."""
    result, problem = None, None
    try:
        result = work()
    except (OSError, ValueError) as error:
        problem = error
    for each in gather(problem):
        if each is not None:
            each.agreed = True  # all ranks raise it, so that one of them may tell
            raise each
    return result  # type: ignore[return-value]
