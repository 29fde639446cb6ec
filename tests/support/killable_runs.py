"""Runs of the command line that tests kill: one process or several ranks, forked, so that a start takes no seconds."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from support.clean_server import processes

CONFIG = """
data: {name: two_moons}
model: {name: mlp, width: 192, depth: 3}
loss: {objective: mmf, lam: {kind: linear, warmup: 20}}
optimizer: {lr: 1e-3, warmup: 10}
train: {steps: 40, batch: 16, log_every: 1, sample_every: 0, checkpoint_every: 3, keep: 3, device: cpu}
"""


class Ranks:
    """mmf_fast/train.py with `arguments` in `count` processes; of one, it is that of no launcher.

    little_room: the rank whose files may not grow beyond so many bytes, as on a full disk.
    """

    def __init__(self, count: int, log: Path, *arguments: object, little_room: tuple[int, int] = (-1, 0)) -> None:
        common = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self.logs = [log.with_name(f"{log.name}.{rank}.log") for rank in range(count)]
        self.all = []
        for rank, path in enumerate(self.logs):
            environment = {key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            limit = little_room[1] if little_room[0] == rank else None
            work = (path, environment if count > 1 else {}, list(map(str, arguments)), limit)
            self.all.append(processes.Process(target=_rank, args=work, daemon=True))
        for each in self.all:
            each.start()

    def wait_until(self, holds: Callable[[], bool], seconds: float = 120) -> None:
        """Until it holds, while all run."""
        end = time.monotonic() + seconds
        while not holds():
            if not all(each.is_alive() for each in self.all):
                raise AssertionError(f"a rank ended by itself:\n{self.text()}")
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"waited {seconds} s:\n{self.text()}")
            time.sleep(0.0005)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(len(self.all)):
            pid = self.all[rank].pid
            if pid is not None and self.all[rank].is_alive():
                os.kill(pid, number)

    def finish(self, seconds: float = 120) -> list[int | None]:
        """The exit statuses. Raises TimeoutError, having killed all, where one still runs."""
        end = time.monotonic() + seconds
        for each in self.all:
            each.join(max(0.0, end - time.monotonic()))
        waited = [rank for rank, each in enumerate(self.all) if each.is_alive()]
        if waited:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"ranks {waited} still ran after {seconds} s:\n{self.text()}")
        return [each.exitcode for each in self.all]

    def text(self, rank: int | None = None) -> str:
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(path.read_text() for path in logs if path.exists())


def _rank(log: Path, environment: dict[str, str], arguments: list[str], limit: int | None) -> None:
    """The work of one process; its standard streams go into a file."""
    import resource

    from mmf_fast.cli import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(main(["train", *arguments]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(run: Path) -> dict[int, float]:
    """By step. The last line may be cut off by a kill."""
    found = {}
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        found[record["step"]] = record["loss"]
    return found
