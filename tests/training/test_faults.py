"""Runs that are killed, stopped, or out of disk, and checkpoints that are damaged: every one goes on as if nothing had
been, and loses nothing but the steps since its last checkpoint."""

import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.killable_runs import CONFIG, Ranks, free_port, losses
from support.launch import ROOT, environment

from mmf_fast.cli import main

pytest.importorskip("deepspeed")
psutil = pytest.importorskip("psutil")

TWO = ("train.zero=zero1.json",)
SHORT = ("train.steps=12",)
MODEL = "{name: mlp, width: 192, depth: 3}"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one process that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.yaml").write_text(CONFIG)
    assert main(["train", "--config", str(folder / "config.yaml"), "--run", str(folder / "run")]) == 0
    return losses(folder / "run")


def resumed_at(text: str) -> int:
    found = re.search(r"going on from step_(\d+)\.pt", text)
    assert found or "no checkpoint yet" in text, text
    return int(found[1]) if found else 0


def last_saved(run: Path, every: int) -> int:
    """The step whose checkpoint must be there, for a step is logged, then saved, then the next one is logged."""
    return (max(losses(run), default=1) - 1) // every * every


def go_on(run: Path, count: int, *options: str, every: int = 3, lost: bool = True) -> str:
    """Resumes an interrupted run to its end; what rank 0 said.

    lost: whether steps since the last checkpoint are, or none at all.
    """
    at_least, last = last_saved(run, every), max(losses(run), default=0)
    ranks = Ranks(count, run.with_name("go_on"), "--run", run, "--resume", *(TWO if count > 1 else ()), *options)
    assert ranks.finish() == [0] * count, ranks.text()
    step = resumed_at(ranks.text(0))
    assert at_least <= step <= last if lost else step == last
    assert not list(run.rglob("*.tmp"))
    return ranks.text(0)


def check(run: Path, whole: dict[int, float], count: int, steps: int = 12) -> None:
    """One process repeats every bit; two ranks add in another order."""
    found, want = losses(run), {step: loss for step, loss in whole.items() if step <= steps}
    assert found == (want if count == 1 else pytest.approx(want, rel=1e-5))


def test_ranks_that_go_on_drop_the_units_that_they_would_have_dropped(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    model = "{name: dit, patch_size: 4, width: 16, depth: 1, heads: 2, dropout: 0.5}"
    path.write_text(CONFIG.replace("{name: two_moons}", "{name: digits}").replace(MODEL, model))
    for run, stops in (("whole", [6]), ("cut", [3, 6])):
        for steps in stops:
            arguments = ("--config", path, "--run", tmp_path / run, "--resume", *TWO, f"train.steps={steps}")
            ranks = Ranks(2, tmp_path / f"{run}{steps}", *arguments)
            assert ranks.finish() == [0, 0], ranks.text()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "killed", [(1,), pytest.param((0,), marks=pytest.mark.slow), pytest.param((0, 1), marks=pytest.mark.slow)]
)
def test_killed_ranks_take_the_others_with_them(
    killed: tuple[int, ...], config: Path, tmp_path: Path, whole: dict[int, float]
) -> None:
    run = tmp_path / "run"
    ranks = Ranks(2, tmp_path / "cut", "--config", config, "--run", run, *TWO, *SHORT)
    ranks.wait_until(lambda: len(losses(run)) >= 5)
    ranks.send(signal.SIGKILL, *killed)
    for rank, status in enumerate(ranks.finish(seconds=60)):  # no launcher here: nobody ends the other rank
        assert status == -signal.SIGKILL if rank in killed else status not in (0, None)
    assert "warning: " not in go_on(run, 2)
    check(run, whole, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "kills"), [(1, 20), (2, 8)])
def test_kills_during_checkpoint_writes_lose_no_checkpoint(
    count: int, kills: int, config: Path, tmp_path: Path, whole: dict[int, float]
) -> None:
    """At random moments of a write, of all ranks and of one in turn; no kill damages anything, so no word of damage."""
    run, generator, during, saved = tmp_path / "run", random.Random(count), 0, 0
    often = ["train.checkpoint_every=1", *(TWO if count > 1 else ())]
    for kill in range(kills):
        last = max(losses(run), default=0)
        ranks = Ranks(count, tmp_path / f"cut{kill}", "--config", config, "--run", run, "--resume", *often)
        ranks.wait_until(lambda: max(losses(run), default=0) > last)  # noqa: B023 (called at once)
        ranks.wait_until(lambda: any((run / "checkpoints").glob("*.tmp")))
        time.sleep(generator.uniform(0, 0.03))
        ranks.send(signal.SIGKILL, *([] if kill % 2 else [generator.randrange(count)]))
        ranks.finish(seconds=60)
        said = ranks.text(0)
        assert "warning: " not in said and resumed_at(said) >= saved, said
        during += any((run / "checkpoints").glob("*.tmp"))
        saved = last_saved(run, every=1)
    assert during >= kills // 4, f"only {during} of {kills} kills fell into a write"
    assert saved < 40
    assert "warning: " not in go_on(run, count, *often, every=1)
    check(run, whole, count, steps=40)
    assert not list(run.glob("model.*.tmp"))


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[(signal.SIGTERM, 0)], [(signal.SIGTERM, 1)], [(signal.SIGINT, 0, 1)] * 2])
def test_a_signal_to_any_rank_saves_and_ends_all(
    signals: list[tuple[Any, ...]], config: Path, tmp_path: Path, whole: dict[int, float]
) -> None:
    """Twice to all is what happens where a launcher passes on a signal that the whole process group received. Most of
    the time ranks are asking each other whether one came: it must not be lost where it comes then."""
    run = tmp_path / "run"
    endless = ["train.steps=100000", "train.checkpoint_every=100000"]
    ranks = Ranks(2, tmp_path / "stopped", "--config", config, "--run", run, *TWO, *endless)
    ranks.wait_until(lambda: len(losses(run)) >= 5)
    for number, *to in signals:
        ranks.send(number, *to)
        time.sleep(0.05)
    assert ranks.finish(seconds=60) == [128 + signals[0][0]] * 2, ranks.text()
    step = max(losses(run))
    assert f"saved at step {step} on {signals[0][0].name}" in ranks.text(0)
    go_on(run, 2, f"train.steps={step + 4}", lost=False)
    check(run, whole, 2, steps=step + 4)


# ---- an exception on one rank --------------------------------------------------------------------------------------

FAILING = CONFIG.replace(
    "model: {name: mlp, width: 192, depth: 3}", "model: {name: 'support.failing_network:FailingNetwork', %s}"
)


@pytest.mark.parametrize(
    ("where", "rank", "zero"),
    [
        ("backward", 1, "zero1.json"),
        ("forward", 0, "fsdp"),  # the rank that keeps the store by which they tell each other
        pytest.param("forward", 1, "zero3.json", marks=pytest.mark.slow),
        pytest.param("backward", 0, "zero3.json", marks=pytest.mark.slow),
        pytest.param("backward", 1, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_what_fails_on_one_rank_ends_all_and_is_named_once(where: str, rank: int, zero: str, tmp_path: Path) -> None:
    """There is no launcher here: the other rank waits in a collective, and ends by itself."""
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(FAILING % f"where: {where}, rank: {rank}")
    ranks = Ranks(2, tmp_path / "failed", "--config", config, "--run", run, f"train.zero={zero}", *SHORT)
    ranks.wait_until(lambda: len(losses(run)) >= 2)
    assert ranks.finish(seconds=30) == [1, 1], ranks.text()
    line = f"rank {rank}: OutOfMemoryError: no memory left for the {where} pass"
    assert ranks.text(rank).splitlines()[-1] == f"error: {line}"
    assert "error: " not in ranks.text(1 - rank) and "Traceback" not in ranks.text(), ranks.text()
    assert line in (run / "logs" / f"rank_{1 - rank}.log").read_text().splitlines()[-1]
    assert "_fail" in (run / "logs" / f"rank_{rank}.log").read_text()  # the traceback


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_what_fails_on_one_rank_ends_the_launcher(launcher: str, tmp_path: Path) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(FAILING % "where: backward")
    words = TORCHRUN if launcher == "torchrun" else [*DEEPSPEED, f"--master_port={free_port()}"]
    words = [*words, *TRAIN, "--config", str(config), "--run-folder", str(run), *TWO, *SHORT]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode != 0
    said = [line for line in (done.stdout + done.stderr).splitlines() if "error: rank " in line]
    assert len(said) == 1 and said[0].endswith("rank 1: OutOfMemoryError: no memory left for the backward pass")


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with the checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("six")
    (folder / "config.yaml").write_text(CONFIG)
    ranks = Ranks(2, folder / "log", "--config", folder / "config.yaml", "--run", folder / "run", *TWO, "train.steps=6")
    assert ranks.finish() == [0, 0], ranks.text()
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("full", [0, 1])
def test_ranks_without_room_for_their_share_end_together(
    full: int, six: Path, tmp_path: Path, whole: dict[int, float]
) -> None:
    """A limit on the size of files stands for the full disk of one node."""
    run = shutil.copytree(six, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    ranks = Ranks(2, tmp_path / "full", "--run", run, "--resume", *TWO, *SHORT, little_room=(full, 2**20))
    assert ranks.finish(seconds=60) == [1, 1], ranks.text()
    name = "step_0000009.pt" if full == 0 else "step_0000009.rank1.pt"
    assert f"{name}: cannot be written" in ranks.text(full).splitlines()[-1], ranks.text()
    assert "error: " not in ranks.text(1 - full) and "Traceback" not in ranks.text()
    for rank in range(2):
        assert f"{name}: cannot be written" in (run / "logs" / f"rank_{rank}.log").read_text()
    kept = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir() if path.name in before}
    assert kept == before
    go_on(run, 2, *SHORT)
    check(run, whole, 2)


def can_mount() -> bool:
    probe = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


DISK = """
mount -t tmpfs -o size=26m none "$1" || exit 99
"${@:3}" --config "$2" --run-folder "$1/run" train.steps=40
status=$?
mount -o remount,size=200m "$1"
"${@:3}" --run-folder "$1/run" --resume train.steps=40 || exit 98
cp -r "$1/run" "$1.kept"
exit $status
"""  # the mount is seen by this shell alone and goes with it


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    count: int, config: Path, tmp_path: Path, whole: dict[int, float]
) -> None:
    if not can_mount():
        pytest.skip("a small tmpfs cannot be mounted here")
    (tmp_path / "disk").mkdir()
    train = [sys.executable, str(ROOT / "mmf_fast" / "train.py")] if count == 1 else [*TORCHRUN, *TRAIN, *TWO]
    shell = ["unshare", "--map-root-user", "--mount", "bash", "-c", DISK, "bash", tmp_path / "disk", config, *train]
    done = subprocess.run(shell, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "No space left on device" in line and "make room, go on with --resume" in line
    assert "no checkpoint yet" not in done.stderr and resumed_at(done.stderr) > 0
    check(tmp_path / "disk.kept", whole, count, steps=40)


# ---- damaged files ---------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step_0000006.rank1.pt", "step_0000006.pt"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_share_is_named_and_all_ranks_take_the_checkpoint_before_it(
    damage: Callable[[Path], None], name: str, six: Path, tmp_path: Path, whole: dict[int, float]
) -> None:
    run = shutil.copytree(six, tmp_path / "run")
    damage(run / "checkpoints" / name)
    ranks = Ranks(2, tmp_path / "resumed", "--run", run, "--resume", *TWO, *SHORT)
    assert ranks.finish() == [0, 0], ranks.text()
    assert resumed_at(ranks.text(0)) == 3
    if damage is not Path.unlink or "rank1" in name:  # without its main file there is no checkpoint to speak of
        assert f"{name}: " in ranks.text(0) and "the checkpoint before it is used" in ranks.text(0)
    assert "warning: " not in ranks.text(1)  # one rank in all reads for the checksums, and speaks
    check(run, whole, 2)


@pytest.mark.slow
def test_killed_where_a_damaged_checkpoint_is_replaced(six: Path, tmp_path: Path, whole: dict[int, float]) -> None:
    """The same step is written again, its new share beside the old main file; a kill between them mixes nothing."""
    run = shutil.copytree(six, tmp_path / "run")
    flip_a_bit(run / "checkpoints" / "step_0000006.rank1.pt")
    damaged = (run / "checkpoints" / "step_0000006.rank1.pt").read_bytes()
    ranks = Ranks(2, tmp_path / "again", "--run", run, "--resume", *TWO, *SHORT)
    ranks.wait_until(lambda: (run / "checkpoints" / "step_0000006.rank1.pt").read_bytes() != damaged)
    ranks.send(signal.SIGKILL)
    ranks.finish()
    go_on(run, 2)
    check(run, whole, 2)


# ---- launchers -------------------------------------------------------------------------------------------------------

TRAIN = [str(ROOT / "mmf_fast" / "train.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2"]


def processes_of(launcher: subprocess.Popen) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """(the launcher and all below it; the training processes among them, in the order of their ranks)"""
    top = psutil.Process(launcher.pid)
    found = [top, *top.children(recursive=True)]
    ranks = [process for process in found if process.environ().get("RANK") and TRAIN[0] in process.cmdline()[:4]]
    return found, sorted(ranks, key=lambda process: process.environ()["RANK"])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
@pytest.mark.parametrize("fault", ["kill", "terminate"])
def test_launchers_end_all_ranks_and_the_run_goes_on(
    launcher: list[str], fault: str, config: Path, tmp_path: Path, whole: dict[int, float]
) -> None:
    run = tmp_path / "run"
    port = [f"--master_port={free_port()}"] if launcher is DEEPSPEED else []
    words = [*launcher, *port, *TRAIN, "--config", config, "--run-folder", run, *TWO, "train.steps=100000"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(words, env=environment(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    end = time.monotonic() + 120
    while len(losses(run)) < 5 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    everything, ranks = processes_of(process)
    try:
        assert len(ranks) == 2 and losses(run), (tmp_path / "log").read_text()
        if fault == "kill":
            ranks[1].kill()
        else:  # as a cluster, or a terminal, does: launcher and ranks all receive it
            for each in everything:
                each.terminate()
        assert process.wait(timeout=90) != 0
        gone, alive = psutil.wait_procs(ranks, timeout=30)
        assert not alive, (tmp_path / "log").read_text()
    finally:
        for each in everything:  # by psutil, which knows a process from a later one of the same number
            with suppress(psutil.NoSuchProcess):
                each.kill()
    step = max(losses(run))
    saved = fault == "terminate"
    if saved:
        assert f"saved at step {step} on SIGTERM" in (tmp_path / "log").read_text()
    steps = math.ceil((step + 1) / 3) * 3
    go_on(run, 2, f"train.steps={steps}", lost=not saved)
    check(run, whole, 2, steps=steps)
