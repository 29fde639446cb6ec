"""The first day on a GPU, rehearsed on a CPU: the same code at toy sizes, and what happens when it goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import packaging
import pytest
import torch

from benchmarks.gpu import PARTS, report, tiles, wheels
from benchmarks.gpu.__main__ import main, name_of
from benchmarks.gpu.rows import AGAIN, LOST, Rows, TimeUp
from benchmarks.gpu.tests import kind_of

ROOT = Path(__file__).parent.parent.parent


def rehearse(folder: Path, *arguments: str, minutes: float = 5) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", f"--minutes={minutes}", f"--out={folder}", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def read(folder: Path, part: str) -> dict:
    return json.loads((folder / f"{part}.json").read_text())


def is_whole(run: dict) -> bool:
    return run["ended"] == "complete" and not any("error" in row for row in run["rows"])


def test_tiles_are_swept_and_reported(tmp_path):
    pytest.importorskip("triton")
    done = rehearse(tmp_path, "--part=tiles")
    assert done.returncode == 0, done.stdout + done.stderr
    run = read(tmp_path, "tiles")
    assert is_whole(run) and {row["kernel"] for row in run["rows"]} == {"forward", "key", "query"}
    assert all(row["error of values"] < 1e-5 and row["seconds"] > 0 for row in run["rows"])
    text = report.one_device(tmp_path)
    assert "| forward | tf32 | 16 | 16 |" in text and "not complete" not in text


def test_a_configuration_is_timed_itself_and_not_what_the_package_would_choose(monkeypatch):
    """As after one that did not fit, which the package replaces by another from then on."""
    launched = []
    monkeypatch.setattr(tiles.autotune, "launch", lambda call, config: launched.append((call, config)))
    kernel = tiles.Kernel("forward", 16, tiles.Size(1, 1, 16), "call", [], [])
    kernel.launch(tiles.Config(128, 128, 8, 3))
    assert launched == [("call", (128, 128, 8, 3))]


def test_a_kernel_that_is_refused_spoils_no_input_of_the_next(monkeypatch):
    """What a kernel is to write is filled with NaN before; the backward kernels read what the forward kernel writes."""
    pytest.importorskip("triton")
    kernels = tiles.kernels_of(tiles.TOY_SWEEP, 16, torch.float32, "cpu")
    config = tiles.Config(16, 16, 4, 1)

    def refuse(call, config):
        raise MemoryError

    for kernel in kernels:
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(tiles.autotune, "launch", refuse)
            kernel.time(config, 1)
    for kernel in reversed(kernels):
        assert kernel.time(config, 1)["error of values"] < 1e-5


@pytest.mark.slow
def test_every_part_is_rehearsed(tmp_path):
    pytest.importorskip("triton")
    done = rehearse(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(is_whole(read(tmp_path, part)) and read(tmp_path, part)["rows"] for part in PARTS)
    text = report.one_device(tmp_path)
    assert all(f"#### {report.TITLES[part]}" in text for part in PARTS)
    assert "3 passed, 0 failed" in text and "| one process |" in text and "SDPA, no tangent" in text


def rows_at(tmp_path, left=60.0, resume=False):
    return Rows(tmp_path / "steps.json", time.time() + left, {"device": "none"}, resume)


def test_a_row_that_fails_says_why_and_the_next_is_measured(tmp_path):
    rows = rows_at(tmp_path)
    rows.measure({"name": "a"}, lambda: 1 / 0)
    rows.measure({"name": "b"}, lambda: {"seconds": 0.12345678})
    first, second = read(tmp_path, "steps")["rows"]
    assert first["error"] == "ZeroDivisionError: division by zero"
    assert second["seconds"] == 0.1235 and "error" not in second


def test_a_part_whose_process_died_goes_on_after_the_row_that_killed_it(tmp_path):
    rows = rows_at(tmp_path)
    rows.measure({"name": "a", "size": 1 / 3}, lambda: {"seconds": 1.0})

    def die():
        raise SystemExit(AGAIN)

    with pytest.raises(SystemExit):
        rows.measure({"name": "b"}, die)
    measured = []
    rows = rows_at(tmp_path, resume=True)
    for row in ({"name": "a", "size": 1 / 3}, {"name": "b"}, {"name": "c"}):
        rows.measure(row, lambda row=row: measured.append(row["name"]) or {})
    assert measured == ["c"] and read(tmp_path, "steps")["rows"][1]["error"] == LOST


def test_a_part_whose_time_is_up_keeps_its_rows(tmp_path):
    rows = rows_at(tmp_path, left=2)

    def part():
        rows.measure({"name": "a"}, lambda: {"seconds": 1.0})
        rows.measure({"name": "b"}, lambda: time.sleep(60))

    assert rows.run(part) == 0
    run = read(tmp_path, "steps")
    assert run["ended"] == "time is up" and [row["name"] for row in run["rows"]] == ["a"]
    with pytest.raises(TimeUp):
        rows.measure({"name": "c"}, dict)


def test_sigterm_ends_a_part_as_its_deadline_does(tmp_path):
    rows = rows_at(tmp_path)
    assert rows.run(lambda: rows.measure({"name": "a"}, lambda: os.kill(os.getpid(), signal.SIGTERM))) == 0
    assert read(tmp_path, "steps")["ended"] == "time is up"


def test_a_part_that_dies_is_started_again(tmp_path, monkeypatch):
    log = tmp_path / "log"
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *--resume*) exit 0;; esac\nkill -SEGV $$\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main(["--part=profile", f"--out={tmp_path}"]) == 0
    first, second = log.read_text().splitlines()
    assert "--resume" not in first and second == f"{first} --resume"


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--part=tests", f"--until={time.time() + 60}"]) == 2
    assert "error: no CUDA device here; --toy" in capsys.readouterr().err


def test_devices_have_folders():
    assert name_of("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert name_of("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"


def test_where_nothing_was_measured_the_page_says_so(tmp_path):
    assert report.section(tmp_path).splitlines()[2:] == [report.NOTHING]


def test_tests_of_one_kernel_dtype_and_head_size_are_one_kind():
    def item(name, **params):
        callspec = SimpleNamespace(params={"device": "cuda", **params})
        return SimpleNamespace(path=Path("tests/ops/test_x.py"), name=name, originalname="test_y", callspec=callspec)

    one, other = item("test_y[1]", shape=(7, 7, 24), dtype=0), item("test_y[2]", shape=(5, 33, 24), dtype=0)
    assert kind_of(one) == kind_of(other)
    assert kind_of(one) != kind_of(item("test_y[3]", shape=(7, 7, 32), dtype=0))
    assert kind_of(item("test_y[4]", shape=())) != kind_of(one)


def wheel(folder, name, version, *needs):
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines))


def test_wheels_are_for_what_is_missing_and_what_that_needs_newer(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, check: None)
    wheel(tmp_path, "not_here", "1.0", "numpy>=99", 'pillow>=99; extra == "dev"', "packaging>=1", "nor_here")
    wheel(tmp_path, "nor_here", "1.0")
    for name in ("numpy", "pillow", "packaging"):
        wheel(tmp_path, name, "99.1")
    assert sorted(wheels.install(tmp_path, tmp_path)) == ["nor-here", "not-here", "numpy"]


def test_wheels_are_installed_where_there_is_nothing_but_pip(tmp_path):
    """Not even what reads the requirements of a wheel: it is taken from the wheel itself."""
    installed = Path(packaging.__file__).parent
    wheel(tmp_path, "packaging", "99.1")
    with zipfile.ZipFile(tmp_path / "packaging-99.1-py3-none-any.whl", "a") as archive:
        for path in installed.glob("**/*.py"):
            archive.write(path, path.relative_to(installed.parent))
    wheel(tmp_path, "not_here", "1.0", "packaging>=1")
    code = "import pathlib, subprocess; from benchmarks.gpu import wheels; subprocess.run = lambda command, check: 0; "
    code += f"print(wheels.install(pathlib.Path({str(tmp_path)!r}), pathlib.Path()))"
    bare = [sys.executable, "-S", "-c", code]  # without site-packages
    done = subprocess.run(bare, cwd=ROOT, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['not-here', 'packaging']"


def test_wheels_that_need_others_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    wheel(tmp_path, "one", "1.0", "torch", "other", 'older; python_version < "3.12"', "far.away>=2")
    wheel(tmp_path, "other", "1.0", "One")
    with pytest.raises(ValueError, match="others there need far-away; add them"):
        wheels.fetch(tmp_path, "3.12")


def test_a_folder_without_wheels_is_named(tmp_path):
    with pytest.raises(ValueError, match="make wheels"):
        wheels.install(tmp_path, tmp_path)
    done = rehearse(tmp_path, "--part=tests", f"--wheels={tmp_path}")
    assert (done.returncode, done.stderr) == (2, f"error: --wheels {tmp_path}: no wheels there; make wheels\n")
