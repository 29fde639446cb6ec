"""Evaluating a function again as it ran first: recomputation, finite differences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["RandomState", "on_copies_of_buffers"]


class RandomState:
    """The states of the global generators, of the CPU and of `device`, as they are when this is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states = self._now()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The scope in which the generators begin at these states; afterwards they are where they were before it."""
        now = self._now()
        self._set(self.states)
        try:
            yield
        finally:
            self._set(now)

    def _now(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type not in ("cpu", "meta"):
            states.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return states

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.get_device_module(self.device).set_rng_state(states[1], self.device)


@contextmanager
def on_copies_of_buffers() -> Iterator[None]:
    """The scope in which the modules that are called have copies of their buffers (running means, the vectors of a
    spectral norm), to change for nothing."""
    own: dict[nn.Module, dict[str, Tensor | None]] = {}
    copies: dict[Tensor, Tensor] = {}  # one of a tensor that several modules hold

    def copy(called: nn.Module, args: object) -> None:
        for module in () if called in own else called.modules():
            if module not in own:
                own[module] = dict(module._buffers)
                for name, x in own[module].items():
                    if x is not None:
                        module._buffers[name] = copies.setdefault(x, x.clone())

    copying = register_module_forward_pre_hook(copy)
    try:
        yield
    finally:
        copying.remove()
        for module, buffers in own.items():
            module._buffers.update(buffers)
