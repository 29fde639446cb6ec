"""The ImageNet recipe on made images, started as a user starts it: images/s under DeepSpeed's ZeRO-1 and without it."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Rows, end
from benchmarks.results import Row
from mmf_fast.training import record

ROOT = Path(__file__).parent.parent.parent
CONFIG = "configs/imagenet64.yaml"
LAUNCHERS = {  # what the run is started with, and what it overrides
    "DeepSpeed, ZeRO-1": ([sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=1"], []),
    "one process": ([sys.executable], ["train.zero=''"]),
}
COMMON = ["train.sample_every=0", "train.checkpoint_every=1000000"]
FULL = [*COMMON, "train.compile=blocks", "train.log_every=20"]  # by block it is compiled in a minute, not in many
TOY = [
    *(*COMMON, "train.compile=false", "train.log_every=2", "train.batch=8", "train.precision=fp32"),
    *("model.width=32", "model.depth=1", "model.heads=2", "data.count=64", "data.shape=[3,8,8]", "data.num_classes=4"),
]
SECONDS = 60.0  # of training that are measured, once the first steps are over
ENDING = 10  # seconds of its share of the time that a run has to end


def run(rows: Rows, device: str, toy: bool) -> None:
    for place, name in enumerate(LAUNCHERS):
        share = rows.left() / (len(LAUNCHERS) - place)

        def train(name: str = name, until: float = time.time() + share) -> Row:
            return _train(*LAUNCHERS[name], toy, until - ENDING)

        rows.measure({"recipe": CONFIG, "launcher": name}, train)


def _train(launcher: list[str], overrides: list[str], toy: bool, until: float) -> Row:
    """Medians over the logged stretches of a run that is ended after SECONDS of training, or at `until`; the first
    stretch, which compiles, is left out. Raises RuntimeError for a run that logged no other."""
    wanted = 0.0 if toy else SECONDS
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = ["mmf_fast/train.py", "--config", CONFIG, "--run-folder", str(run), "data=synthetic"]
        command = [*launcher, *arguments, *overrides, *(TOY if toy else FULL)]
        with open(Path(folder) / "output", "w+") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
            try:
                first = None
                while process.poll() is None and time.time() < until:
                    time.sleep(0.2)
                    records = record.read(run / "metrics.jsonl")
                    first = first or (time.time() if records else None)
                    if first and time.time() - first > wanted and len(records) > 2:
                        break
            finally:
                end(process)
            output.seek(0)
            said = output.read().strip().splitlines()
        records = record.read(run / "metrics.jsonl")[1:]
    if not records:
        raise RuntimeError(f"no second stretch of steps was logged: {' | '.join(said[-3:])[-180:]}")
    names = ["images_per_second", "step_seconds", "data_seconds", "loss_seconds", "backward_seconds"]
    names += ["optimizer_seconds", "peak_memory_gib", "mfu"]
    found: dict[str, Any] = {n: statistics.median([r[n] for r in records]) for n in names if n in records[-1]}
    return {
        "images/s": found.pop("images_per_second"),
        **found,
        "steps": records[-1]["step"],
        "lam": records[-1]["lam"],
    }
