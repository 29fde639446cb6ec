"""The record of a run: metrics.jsonl (one JSON object per logged step), TensorBoard and other callbacks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TypeAlias

from torch.utils.tensorboard import SummaryWriter

from mmf_fast.files import write_text

Callback: TypeAlias = Callable[[int, dict[str, float]], Any]  # callback(step, row)


class MetricsLog:
    """Appends rows to metrics.jsonl. A run that goes on from `step` forgets what was logged beyond it."""

    def __init__(self, run: Path, step: int) -> None:
        self.path, self.step = run / "metrics.jsonl", step
        kept = [json.dumps(record) + "\n" for record in read(self.path) if record["step"] <= step]
        write_text(self.path, "".join(kept))
        self._rows, self._hash = len(kept), hashlib.sha256("".join(kept).encode())
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed by close)

    def __call__(self, step: int, row: dict[str, float]) -> None:
        """Non-finite values become null: JSON has no NaN."""
        plain = {key: value if math.isfinite(value) else None for key, value in row.items()}
        line = json.dumps({"step": step, **plain}, allow_nan=False) + "\n"
        self.file.write(line)
        self._rows += 1
        self._hash.update(line.encode())

    def mark(self) -> dict[str, Any]:
        """What the file holds: kept in a checkpoint, so that a change of it is noticed."""
        return {"rows": self._rows, "sha256": self._hash.hexdigest()}

    def changed_since(self, mark: dict[str, Any]) -> str | None:
        """What to say where the file does not hold what it did then."""
        if mark == self.mark():
            return None
        found, written = self._rows, mark["rows"]
        what = f"holds {found} of the {written} rows" if found != written else "does not hold the rows"
        return (
            f"{self.path}: {what} that this run wrote up to step {self.step}: it was changed, and curves have gaps; "
            "training goes on"
        )

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """A callback that shows rows in TensorBoard, which forgets what it had beyond `step`."""

    def __init__(self, run: Path, step: int = 0) -> None:
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def __call__(self, step: int, row: dict[str, float]) -> None:
        for key, value in row.items():
            self.board.add_scalar(key, value, step)

    def close(self) -> None:
        self.board.close()


class Rows:
    """Hands each row to all callbacks, and closes those that can be, however the block ends."""

    def __init__(self, log: MetricsLog, *others: Callback) -> None:
        self.folder = log.path.parent
        self.callbacks: tuple[Callback, ...] = (log, *others)

    def __call__(self, step: int, row: dict[str, float]) -> None:
        try:
            for callback in self.callbacks:
                callback(step, dict(row))
        except OSError as error:
            raise OSError(
                f"{self.folder}: step {step} cannot be recorded ({error.strerror or error}); "
                "checkpoints are whole; make room, go on with --resume"
            ) from error

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for callback in self.callbacks:
            with suppress(OSError) if error else nullcontext():  # a full disk is named once, and by who met it first
                getattr(callback, "close", lambda: None)()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, none if it is not there; lines that are none, such as one cut off by a crash, are
    left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records
