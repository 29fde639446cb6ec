"""Steps that were left out as their loss or gradient was not finite: how many, and when they are too many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmf_fast.distributed import gather, rank_and_count
from mmf_fast.training.checkpoint import Checkpoints

__all__ = ["NonFiniteError", "Skipped"]


class NonFiniteError(FloatingPointError):
    """Too many steps in a row had a non-finite loss or gradient; the weights are those before the first of them."""

    told: bool


class Skipped:
    """Counts them on the device, for which the host waits only where it reads the counts: at `total`, `state` and
    `check`.

    most: so many in a row end the run.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        self.most = most
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros_like(self._total)

    def count(self, skipped: Tensor) -> None:
        """Of one step (0-d bool tensor)."""
        self._total += skipped
        self._in_a_row = (self._in_a_row + 1) * skipped

    @property
    def total(self) -> int:
        return int(self._total)

    def state(self) -> dict[str, int]:
        return {"skipped": self.total, "skipped_in_a_row": int(self._in_a_row)}

    def load(self, state: dict[str, Any]) -> None:
        """Of what `state` returned, which may lie among other things."""
        self._total.fill_(state["skipped"])
        self._in_a_row.fill_(state["skipped_in_a_row"])

    def check(self, step: int, x: Tensor, checkpoints: Checkpoints) -> None:
        """Raises NonFiniteError, on all ranks, where the last `most` were left out; it says whether x, the last data,
        are the cause."""
        if int(self._in_a_row) < self.most:
            return
        finite = all(gather(bool(torch.isfinite(x).all())))
        cause = "the loss or its gradient is" if finite else "the data are"
        found = checkpoints.newest()
        intact = f"the last good checkpoint is {found}" if found else "no checkpoint was written yet"
        error = NonFiniteError(
            f"stopped at step {step}: {cause} not finite in {int(self._in_a_row)} steps in a row, all skipped; "
            f"{intact}; start another run with a lower optimizer.lr or optimizer.clip, or mend the data"
        )
        error.told = rank_and_count()[0] > 0  # all ranks raise it, and the first one tells it
        raise error
