"""The first day on a GPU: python -m benchmarks.gpu (make gpu), or one part of it at a time, with --part.

    tests     the kernels against their references: one case per kernel, dtype and head size, then all tests of a GPU
    tiles     block sizes, warps and stages of the attention kernels; `python -m benchmarks.gpu.defaults` makes them
              the defaults
    kernels   operators against the device's limits, PyTorch's functions and what else is installed
    steps     training steps over flow matching: time, model FLOPs utilisation, memory
    imagenet  images/s of the ImageNet recipe on one GPU, under DeepSpeed's ZeRO-1 and without it
    profile   what the time of one step goes to

Each part has a process and --minutes of its own, and writes RESULTS/<device>/<part>.json anew after every row: a part
that is ended, or that a kernel kills, keeps its rows. A part whose process died goes on in another, after the row that
killed it. Nothing is downloaded: --wheels names a folder of wheels (make wheels) for what the machine lacks. --toy runs
the same code on a CPU, at sizes whose times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import PARTS

INTERPRETED = ("tests", "tiles", "kernels")  # as toys: their Triton kernels run in the interpreter
ROOT = Path(__file__).parent.parent.parent
TOYS = ROOT / ".benchmarks" / "toy"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--part", action="append", choices=PARTS, help="this one; may be repeated (default: all)")
    result.add_argument("--minutes", type=float, default=6.0, help="of each part, start and compilation included (6)")
    result.add_argument("--out", type=Path, help="where <part>.json goes (default: benchmarks/results/<device>)")
    result.add_argument("--wheels", type=Path, help="folder of wheels; what is missing here is installed for the run")
    result.add_argument("--tvm", type=Path, help="a checkout of lumalabs/tvm: its attention is timed beside ours")
    result.add_argument("--toy", action="store_true", help="on a CPU, at sizes whose times mean nothing")
    result.add_argument("--resume", action="store_true", help="keep the rows that the files have")
    result.add_argument("--until", type=float, help=argparse.SUPPRESS)  # set for the process of a part
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 all rows were measured, 1 some failed or a part died, 2 wrong arguments."""
    options = parser().parse_args(arguments)
    if options.until:
        return measure(options.part[0], options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and the part that runs ends with it
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(ROOT), folder, *([str(options.tvm)] if options.tvm else []), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        # Triton's own default, said aloud: inductor moves it elsewhere, and each part would compile the kernels anew.
        environment.setdefault("TRITON_CACHE_DIR", os.path.expanduser("~/.triton/cache"))
        if options.wheels:
            from benchmarks.gpu.wheels import install

            try:
                install(options.wheels, Path(folder))
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
        return max([supervise(part, options, environment) for part in options.part or PARTS])


def supervise(part: str, options: argparse.Namespace, environment: dict[str, str]) -> int:
    """Runs a part in a process of its own, and again where one dies; none outlives the part's time."""
    from benchmarks.gpu.rows import LAST_SECONDS, end

    until = time.time() + 60 * options.minutes
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--until", str(until)]
    command += [f"--out={options.out}"] * bool(options.out) + ["--toy"] * options.toy
    if options.toy:
        environment = environment | {"CUDA_VISIBLE_DEVICES": ""}
        if part in INTERPRETED:
            environment |= {"TRITON_INTERPRET": "1", "MMF_FAST_OPS": "triton"}
    status, resume = 1, options.resume
    while time.time() < until:
        print(f"== {part}, until {time.strftime('%H:%M:%S', time.localtime(until))}", flush=True)
        process = subprocess.Popen(command + ["--resume"] * resume, env=environment, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(until - time.time() + 2 * LAST_SECONDS)
        except subprocess.TimeoutExpired:
            return 1
        finally:
            end(process)
        if status in (0, 1, 2):
            return status
        resume = True
    return min(abs(status), 1)


def measure(part: str, options: argparse.Namespace) -> int:
    """Runs a part in this process."""
    import torch

    from benchmarks.gpu.rows import Rows
    from benchmarks.measure import circumstances, limits, machine
    from mmf_fast.ops import flash

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        print("error: no CUDA device here; --toy runs the same code on a CPU", file=sys.stderr)
        return 2
    served = flash.activate(torch.device(device))  # as the trainer does it
    header = machine(device) | circumstances() | limits(device, size=1 << 20 if options.toy else None)
    header |= {"flash": served._asdict()} if served else {}
    folder = options.out or (TOYS if options.toy else ROOT / "benchmarks" / "results" / name_of(header["device"]))
    rows = Rows(folder / f"{part}.json", options.until, header, options.resume)
    module = importlib.import_module(f"benchmarks.gpu.{part}")
    return rows.run(lambda: module.run(rows, device, options.toy))


def name_of(device: str) -> str:
    """NVIDIA H100 80GB HBM3 -> h100-80gb-hbm3: a folder's name."""
    return "-".join(device.lower().removeprefix("nvidia").split())


if __name__ == "__main__":
    sys.exit(main())
