"""All operators in one call: python -m benchmarks.kernels [--device cuda] [--out benchmarks/results/h200]

Times each fused operator against the same composed of PyTorch's functions (eager; on a GPU compiled too), interleaved,
and writes kernels.json. On the CPU: float32 at sizes of small networks, two threads. On a GPU: bfloat16 and float32 on
tensors of 256 MB and more, with the share of the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from pathlib import Path

import torch

import benchmarks.kernels
from benchmarks.kernels.common import copy_bandwidth, machine, measure

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per case")
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--out", type=Path, default=None, help="folder; by default benchmarks/results/<device>")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"

    run = machine(args.device)
    run["copy GB/s"] = round(copy_bandwidth(args.device, 1 << (30 if cuda else 26)), 1)
    run["results"] = []
    modules = [
        m.name for m in pkgutil.iter_modules(benchmarks.kernels.__path__) if m.name not in ("common", "__main__")
    ]
    for dtype in (torch.bfloat16, torch.float32) if cuda else (torch.float32,):
        for module in modules:
            for case in importlib.import_module(f"benchmarks.kernels.{module}").cases(args.device, dtype, large=cuda):
                if args.only not in case.op:
                    continue
                result = measure(case, args.device, args.seconds, compiled=cuda) | {"dtype": str(dtype)}
                if result["GB/s"]:
                    result["share of copy"] = round(result["GB/s"] / run["copy GB/s"], 3)
                run["results"].append(result)
                speedup = ", ".join(f"{s:.2f} x {name}" for name, s in result["speedup over"].items())
                print(f"{case.op} {case.shape} {case.mode}: {result['ms']['fused']:.2f} ms, {speedup}", flush=True)

    name = run["device"].lower().replace(" ", "-") if cuda else "cpu"
    folder = args.out or ROOT / "benchmarks" / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps(run, indent=1) + "\n")
    print(f"wrote {folder / 'kernels.json'}")


if __name__ == "__main__":
    main()
