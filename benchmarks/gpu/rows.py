"""The rows of one part: a file that is whole after each of them, so that a part that is ended keeps what it has."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import reason
from benchmarks.results import Row, rounded
from mmf_fast.files import write_text

AGAIN = 75  # exit status of a part whose process cannot go on, though the part could: start it again with resume
LOST = "the process ended in this row"
LAST_SECONDS = 20  # after its deadline a process that does not react is ended


class TimeUp(KeyboardInterrupt):
    """The part's time is over. No Exception, so that nobody on the way takes it for a failure of the row."""


class Rows:
    """What a part has measured so far, at `path`: {"part", "machine", "ended", "rows"}.

    until: unix time at which the part ends, wherever it is.  machine: the header.  resume: keep the rows that the file
    has, and measure none of them again.
    """

    def __init__(self, path: Path, until: float, machine: dict[str, Any], resume: bool = False) -> None:
        self.path, self.until, self.machine = path, until, machine
        self.rows: list[Row] = json.loads(path.read_text())["rows"] if resume and path.exists() else []
        self.write()

    def measure(self, key: Row, run: Callable[[], Row]) -> Row:
        """The row of `key` and what `run` finds, or why it fails; an earlier row of the same key as it is.

        Raises TimeUp, and SystemExit (AGAIN) where the error has taken the device away from this process.
        """
        known = self.find(key)
        if known is not None:
            return known
        begin = time.time()
        found = self.attempt(key, run)
        return self.rows[-1] if found is None else self.add(key | found | {"took": time.time() - begin})

    def attempt(self, key: Row, make: Callable[[], Any]) -> Any:
        """What `make` returns; None, and a row that says why, where it fails or failed before. Raises as `measure`."""
        if self.find(key) is not None:
            return None
        if self.left() <= 0:
            raise TimeUp
        row = key | {"error": LOST}  # what the file says if the process ends here
        try:
            self.rows.append(row)
            self.write()
            found = make()
            gc.collect()
        except Exception as error:
            row["error"] = reason(error)
            self.write()
            self.say(row)
            leave_a_lost_device()
            return None
        except KeyboardInterrupt:
            self.rows.remove(row)
            raise
        self.rows.remove(row)
        return found

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        self.write()
        self.say(row)
        return row

    def find(self, key: Row) -> Row | None:
        same = rounded(key)
        return next((row for row in self.rows if all(rounded(row.get(k)) == v for k, v in same.items())), None)

    def left(self) -> float:
        """Seconds until the part's time is over."""
        return self.until - time.time()

    def write(self, ended: str | None = None) -> None:
        """ended: "complete" or "time is up"; None while the part runs, and for ever if its process dies."""
        run = {"part": self.path.stem, "machine": self.machine, "ended": ended, "rows": self.rows}
        write_text(self.path, json.dumps(rounded(run), indent=1) + "\n")

    def say(self, row: Row) -> None:
        shown = {k: v for k, v in rounded(row).items() if not isinstance(v, dict | type(None)) and k != "kernels"}
        print(f"[{self.left():4.0f} s left] {', '.join(f'{k} {v}' for k, v in shown.items())}", flush=True)

    def run(self, part: Callable[[], None]) -> int:
        """Runs the part until it is complete or its time is up; SIGTERM ends its time. Returns the exit status."""

        def end(*_: Any) -> None:
            raise TimeUp

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGALRM, end)
        # Again and again: where a library calls Python from C, as Dynamo's weak references do, what is raised is lost.
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 0.01), 1.0)
        faulthandler.dump_traceback_later(max(self.left(), 0) + LAST_SECONDS, exit=True)
        ended = "complete"
        try:
            part()
        except TimeUp:
            ended = "time is up"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        self.write(ended)
        failed = [row for row in self.rows if "error" in row]
        print(f"{self.path}: {len(self.rows)} rows, {len(failed)} of them failed; {ended}", flush=True)
        return int(bool(failed))


def leave_a_lost_device() -> None:
    """An illegal access in a kernel takes the device from the whole process: only another process can go on."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            print(f"the device is lost to this process: {reason(error)}", file=sys.stderr, flush=True)
            sys.exit(AGAIN)


def end(process: subprocess.Popen[Any], patience: float = 5.0) -> None:
    """Ends a process and all that it started in its session: by SIGTERM, and what is left after `patience` seconds by
    SIGKILL."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
