"""One log per process: run/logs/rank_K.log. The terminal belongs to the progress bar of rank 0, and so do its lines."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

__all__ = ["RankLog"]


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A log that cannot be written is no error here: on a full disk, the record and the checkpoints raise one."""


class RankLog(logging.Logger):
    """The log of one process. What is logged before `recording` waits for it: a refused run leaves no file.

    terminal: whether `say` also writes to the terminal.
    """

    def __init__(self, rank: int, terminal: bool) -> None:
        super().__init__(f"mmf_fast.rank{rank}", logging.INFO)
        self.rank, self.terminal = rank, terminal
        self._waiting = MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        self.addHandler(self._waiting)

    def say(self, message: str, level: int = logging.INFO) -> None:
        """Logs, and tells whoever sits at the terminal, above the progress bar."""
        self.log(level, message)
        if self.terminal:
            prefix = "warning: " if level >= logging.WARNING else ""
            tqdm.write(prefix + message, file=sys.stderr)

    @contextmanager
    def recording(self, run: Path) -> Iterator[None]:
        """Within the block the log is written, Python's warnings and the error that ends the block included; these go
        on their usual way as well. Raises OSError where there can be no file."""
        path = run / "logs" / f"rank_{self.rank}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _File(path)
        except OSError as error:
            raise OSError(
                f"{path}: cannot be written ({error.strerror}); make room or mend it, go on with --resume"
            ) from error
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._waiting.setTarget(file)
        self._waiting.flush()
        self.removeHandler(self._waiting)
        self.addHandler(file)
        try:
            with self._warnings():
                yield
        except BaseException as error:
            self.error("ended by %s", type(error).__name__, exc_info=True)
            raise
        finally:
            self.removeHandler(file)
            self._waiting.setTarget(None)
            self.addHandler(self._waiting)
            with suppress(OSError):
                file.close()

    @contextmanager
    def _warnings(self) -> Iterator[None]:
        with warnings.catch_warnings():
            show = warnings.showwarning

            def both(message: Warning | str, category: type[Warning], filename: str, line: int, *rest: object) -> None:
                self.warning("%s: %s (%s:%d)", category.__name__, message, filename, line)
                show(message, category, filename, line, *rest)  # type: ignore[arg-type]

            warnings.showwarning = both  # type: ignore[assignment]
            yield
