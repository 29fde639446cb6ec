"""The command line as a user meets it: real processes, killed, stopped, out of disk, and given nonsense."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmf_fast.cli import main

REPOSITORY = Path(__file__).parent.parent
SCRIPT = [sys.executable, "mmf_fast/train.py"]
MODULE = [sys.executable, "-m", "mmf_fast", "train"]
CONFIG = """
data: {name: two_moons}
model: {name: mlp, width: 8, depth: 1}
loss: {objective: mmf, stochastic: true, lam: {kind: linear, warmup: 100}}
optimizer: {lr: 1e-3, warmup: 10}
train: {steps: 240, batch: 8, log_every: 1, sample_every: 0, checkpoint_every: 9, keep: 2, device: cpu}
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(CONFIG)
    return path


def start(*arguments: Any, command: list[str] = SCRIPT, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    words = [*command, *map(str, arguments)]
    return subprocess.Popen(words, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True, **options)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def train(*arguments: Any, **options: Any) -> tuple[int, str, str]:
    return finish(start(*arguments, **options))


def records(run: Path) -> list[dict[str, Any]]:
    """What was logged, as text that keeps every bit, without what depends on the clock and the process' memory."""
    measured = ("_second", "_seconds", "_gib")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(measured)} for line in lines]


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Returns once `step` is logged, or the process has ended."""
    path = run / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.002)


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_it_logs_what_an_uninterrupted_run_logs(
    toy: Path, tmp_path: Path, count: int
) -> None:
    """SIGKILL at random moments, before the first checkpoint and within writes too; all must agree in every bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uninterrupted = start("--config", toy, "--run", whole)
    generator = random.Random(20240)
    kills = sorted([generator.randrange(1, 9), *(generator.randrange(9, 225) for _ in range(count - 1))])
    for step in kills:
        process = start("--config", toy, "--run", cut, "--resume")
        wait_for_step(process, cut, step)
        time.sleep(0.02 * generator.random())
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL, f"the process ended before it was killed at step {step}"
    status, _, err = train("--run", cut, "--resume")  # the configuration is that of the run folder
    assert status == 0, err
    assert finish(uninterrupted)[0] == 0
    assert [record["step"] for record in records(whole)] == list(range(1, 241))
    assert records(cut) == records(whole), f"killed at {kills}"
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(toy: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    process = start("--config", toy, "--run", run, "train.steps=100000", "train.checkpoint_every=100000")
    wait_for_step(process, run, 5)
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 128 + number
    assert "Traceback" not in err and "--resume" in err.splitlines()[-1]
    step = records(run)[-1]["step"]
    assert [path.name for path in (run / "checkpoints").glob("*.pt")] == [f"step_{step:07d}.pt"]
    assert f"saved at step {step}" in err


def test_a_full_disk_is_one_line_and_the_run_can_go_on(toy: Path, tmp_path: Path) -> None:
    """A limit on the file size stands for the full disk: the first checkpoint still fits, a larger log does not."""
    run = tmp_path / "run"
    assert main(["train", "--config", str(toy), "--run", str(run), "train.steps=9"]) == 0
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    size = (run / "checkpoints" / "step_0000009.pt").stat().st_size

    def little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    status, _, err = train("--config", toy, "--run", run, "--resume", preexec_fn=little_room)
    assert status == 1, err
    assert "Traceback" not in err
    assert "step_0000018.pt: cannot be written" in err.splitlines()[-1] and "--resume" in err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before
    assert main(["train", "--config", str(toy), "--run", str(run), "--resume", "train.steps=20"]) == 0
    assert [record["step"] for record in records(run)] == list(range(1, 21))


@pytest.mark.parametrize("command", [SCRIPT, MODULE], ids=["script", "module"])
def test_it_starts_as_a_script_and_as_a_module_and_under_a_launcher(
    toy: Path, tmp_path: Path, command: list[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["--local_rank=0", "--config", toy, "train.steps=3", "--run", run, "loss.lam.kind=cosine"]
    status, out, err = train(*arguments, command=command)
    assert status == 0, err
    assert out == f"{run}: 3 steps done\n"
    assert "kind: cosine" in (run / "config.yaml").read_text()


def file_instead_of_folder(tmp_path: Path) -> list[Any]:
    (tmp_path / "file").write_text("")
    return ["--run", tmp_path / "file" / "run"]


def run_of_before(tmp_path: Path) -> list[Any]:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(CONFIG)
    return []


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (lambda tmp_path: ["train.stpes=3"], "unknown key train.stpes; did you mean train.steps?"),
        (lambda tmp_path: ["loss.times.share=-1"], "loss.times.share"),
        (lambda tmp_path: ["model.dim=3"], "leave model.dim out"),
        (file_instead_of_folder, "another --run"),
        (run_of_before, "go on with --resume"),
        (lambda tmp_path: ["--allow-changes"], "add --resume, or leave it out"),
    ],
    ids=["key", "share", "shape", "folder", "run", "changes"],
)
def test_wrong_input_is_one_line_and_status_2(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Callable[[Path], list[Any]], advice: str
) -> None:
    status = main(["train", "--config", str(toy), "--run", str(tmp_path / "run"), *map(str, arguments(tmp_path))])
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and advice in err


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in `mmf ops | head -1`; whatever of the output is written after the reader has left."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mmf_fast", "ops"]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, cwd=REPOSITORY)
    os.close(write)
    assert (run.returncode, run.stderr) == (1, "")


def test_the_process_ends_with_that_line_and_status() -> None:
    status, out, err = train("--resume")
    assert (status, out) == (2, "")
    assert err == "error: --config is missing; for instance --config configs/digits.yaml\n"
