"""A network of diffusers, trained by a script of a user's on two ranks, killed and resumed."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from support.launch import ROOT, SUPPORT, environment, two_ranks

pytest.importorskip("diffusers")
SCRIPT = str(SUPPORT / "diffusers_run.py")


def losses(run: Path) -> list[float]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow  # five starts
def test_killed_and_resumed_it_trains_as_one_process(tmp_path: Path) -> None:
    alone = subprocess.run(
        [sys.executable, SCRIPT, str(tmp_path / "alone"), "8", ""], env=environment(), capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    for zero in ("zero1.json", "fsdp"):
        run = tmp_path / zero
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        process = subprocess.Popen(
            [*launcher, SCRIPT, str(run), "100000", zero],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while len(losses(run)) < 5 and process.poll() is None:
                time.sleep(0.01)
            assert process.poll() is None
        finally:
            everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for each in everything:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(everything[1:], timeout=30)
            process.wait()
        found = max(int(path.stem.removeprefix("step_")) for path in (run / "checkpoints").glob("step_???????.pt"))
        done = two_ranks(SCRIPT, str(run), str(max(8, found + 1)), zero)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"going on from step_{found:07d}.pt" in done.stderr
        assert losses(run)[:8] == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
