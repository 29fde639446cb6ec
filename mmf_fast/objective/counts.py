"""How many rows of a step are intervals (r < t), how many of these keep their tangent in the graph, and which.

Numbers are of a global batch, equal on all ranks, and follow their shares over the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from mmf_fast.objective.draws import BatchShare, Kinds, chances, draw_kinds, given_kinds
from mmf_fast.objective.schedule import LambdaSchedule
from mmf_fast.objective.times import TimeSampler

__all__ = ["Counts"]


@dataclass(frozen=True)
class Counts:
    """Of a loss with these settings, which MeanFlowLoss explains."""

    times: TimeSampler
    lam: LambdaSchedule
    paired: bool
    stochastic: bool

    def of_batch(self, rows: int, step: int) -> tuple[int, int]:
        """How many intervals a batch has at a step, and how many of them keep their tangent in the graph."""
        chance = chances(step)
        intervals = self._intervals(rows, 1, step, chance[0])
        return intervals, self._graphs(intervals, step, chance[1])[1]

    def draw(self, rows: int, step: int | None, part: BatchShare) -> tuple[Kinds, float]:
        """The rows of each kind, and lambda of those that keep their tangent in the graph."""
        chance = chances(step, part)
        intervals = self._intervals(rows, part.count, step or 0, chance[0])
        lam, graphs = self._graphs(intervals, step or 0, chance[1])
        return draw_kinds(rows, part, step or 0, intervals, graphs, self.paired), lam

    def given(self, r: Tensor, t: Tensor, step: int | None, part: BatchShare) -> tuple[Kinds, float]:
        """The same where the times of the rows are given."""
        chance = chances(step, part)[1] if self.stochastic else 0.0
        lam, graphs = self._graphs(int((r < t).sum()), step or 0, chance)
        return given_kinds(r, t, graphs, self.paired), lam

    def called_elsewhere(self, step: int) -> tuple[bool, bool, bool]:
        """Which kinds of rows another rank may have at this step. All must call the network alike, for ZeRO-3 and FSDP
        gather its weights at each call, so a rank without such a row evaluates one for nothing."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return False, False, False
        share, lam = self.times.share_at(step), self.lam(step)
        return share < 1, share > 0 and lam > 0, share > 0 and (lam == 0 or (self.stochastic and lam < 1))

    def _intervals(self, rows: int, parts: int, step: int, chance: float) -> int:
        """How many rows of a global batch of `parts` parts are intervals."""
        found = self.times.intervals(rows * parts, step, chance)
        return min(found, max(1, rows // 2) * parts) if self.paired else found

    def _graphs(self, intervals: int, step: int, chance: float) -> tuple[float, int]:
        """lam of the intervals that keep their tangent in the graph, and how many of them do: with `stochastic`,
        lam * intervals on average over the steps, in at most five values, since each is a graph to the compiler."""
        lam = self.lam(step)
        if not self.stochastic:
            return lam, intervals if lam > 0 else 0
        levels = max((n for n in range(1, 5) if intervals % n == 0), default=1)
        return 1.0, math.floor(lam * levels + chance) * (intervals // levels)
