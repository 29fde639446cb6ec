"""Evaluating a function again with the random numbers of its first run: recomputation, finite differences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["RandomState"]


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
