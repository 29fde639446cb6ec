"""Tensors that receive a Dual: `buffer[i] = dual`, `total += dual`, where the network made the tensor without one.

A plain tensor cannot become a Dual, since others hold it too; but its memory can get a tangent, zero at first. From
then to the end of the pass, what shares that memory is read and written with it, whenever it was made. Until a Dual is
written to a tensor, all this costs one look at an empty table.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["CURRENT", "LIVE", "WRITES", "Buffers", "set_aside", "using"]

WRITES: set[Any] = set()  # the functions that write into their first argument; in_place.py names them
LIVE: set[int] = set()  # the memory with a tangent in any pass that is not traced: a quick look says that there is none


class Buffers:
    """The memory that got a tangent during one pass.

    protected: tensors that share their memory with a Dual that has its own tangent, so that they cannot get one.
    """

    def __init__(self, protected: Iterable[Tensor] = ()) -> None:
        self.protected = list(protected)
        self.tangents: dict[int, tuple[Any, Tensor, Tensor]] = {}  # of a storage: kind of Dual, a tensor in it, tangent

    def receive(self, x: Tensor, kind: Any) -> None:
        """Gives a tangent to the memory of x, where it has none and may have one."""
        if x.layout != torch.strided or not (x.is_floating_point() or x.is_complex()):
            return
        memory = _memory(x)
        if memory in self.tangents or any([_memory(y) == memory for y in self.protected]):
            return
        size = x.untyped_storage().size() // x.element_size()
        whole = x.numel() == size and x.is_contiguous()
        tangent = torch.zeros_like(x) if whole else torch.zeros(size, dtype=x.dtype, device=x.device)
        self.tangents[memory] = kind, x, tangent  # with x, so that nobody else is given its memory
        if not torch.compiler.is_dynamo_compiling():
            LIVE.add(memory)

    def moving(self, args: Any) -> Any:
        """A tuple of arguments with Duals for the tensors whose memory has a tangent."""
        return tuple([self.of(x) for x in args])

    def moving_by_name(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {name: self.of(x) for name, x in kwargs.items()}

    def of(self, x: Any) -> Any:
        """x, a tensor or a sequence of tensors, or the Dual it became."""
        if type(x) in (list, tuple):
            return type(x)([self.of(y) for y in x])
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            return x
        found = self.tangents.get(_memory(x))
        if found is None:
            return x
        kind, first, tangent = found
        if x.dtype != first.dtype:
            raise NotImplementedError(
                f"memory of {first.dtype} that received a Dual is read as {x.dtype}: clone it first"
            )
        if x.shape == tangent.shape and x.stride() == tangent.stride():
            return kind(x, tangent)
        return kind(x, tangent.as_strided(x.shape, x.stride(), x.storage_offset()))


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Thread(threading.local):
    def __init__(self) -> None:
        self.buffers = Buffers()


CURRENT = _Thread()


@contextlib.contextmanager
def using(buffers: Buffers) -> Iterator[Buffers]:
    """The scope of a pass, or of a part of it that runs again."""
    before, tracing = CURRENT.buffers, torch.compiler.is_dynamo_compiling()
    CURRENT.buffers = buffers
    if not tracing:
        LIVE.update(buffers.tangents)
    try:
        yield buffers
    finally:
        CURRENT.buffers = before
        if not tracing:
            LIVE.difference_update(buffers.tangents)


def set_aside() -> contextlib.AbstractContextManager:
    """The scope of a rule, which works on the parts of its Duals: the primal of a buffer is a plain tensor there."""
    return using(Buffers())
