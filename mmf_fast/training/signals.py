"""SIGINT and SIGTERM: they end a run after the step that is being made, on all ranks after the same one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mmf_fast.distributed import gather, rank_and_count

__all__ = ["Signals"]

_ASK_EVERY = 10  # steps: launchers kill after 30 s what has not ended on SIGTERM


class Signals:
    """came: the signal that came within the last block, or None."""

    def __init__(self) -> None:
        self.came: signal.Signals | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within the block a signal is noted. A second one ends the process at once, except where several train: their
        launcher passes on what they have received already, and kills them if it takes too long."""
        self.came = None  # what ended an earlier block does not end this one
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self.came = signal.Signals(number)
            if rank_and_count()[1] == 1:
                signal.signal(number, before[self.came] or signal.SIG_DFL)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def end(self, step: int, every: int) -> bool:
        """Whether one came to any rank; they ask each other, so only at multiples of `every` or 10 steps."""
        if rank_and_count()[1] == 1:
            return self.came is not None
        if step % min(every, _ASK_EVERY):
            return False
        found = [each for each in gather(self.came) if each]
        if found:  # else a signal may just have come to this rank, of which the others hear at the next check
            self.came = found[0]
        return bool(found)
