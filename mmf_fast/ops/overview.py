"""mmf ops: which implementation serves each operator on this machine, and why."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from mmf_fast.ops import attention, flash, gpu, group_norm, layer_norm, native, pointwise, sg_loss
from mmf_fast.ops.dispatch import OPERATORS, serve

DEFINED_IN = (attention, group_norm, layer_norm, pointwise, sg_loss)  # importing them defines the operators


def _flash() -> str:
    chosen = flash.activate(torch.device("cuda")) if torch.cuda.is_available() else None
    return f"{chosen.kind} ({chosen.reason})" if chosen else "not used: no CUDA device"


def _serving(name: str, device: str) -> str:
    """Which implementation serves float32 tensors of a usual size."""
    x = torch.empty(1, 1, 64, 64, device=device)
    return serve(name, *[x] * 8) or "reference"


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="mmf ops", description=(__doc__ or "").partition(": ")[2]).parse_args(arguments)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    print(f"torch {torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    print(f"native: {native.reason() or 'C++ kernels loaded'}")
    if gpu.triton is None:
        print("triton: not installed")
    else:
        print(f"triton: {gpu.triton.__version__}" + ("" if "cuda" in devices else ", not used: no CUDA device"))
    print(f"flash attention (MMF_FAST_FLASH={'|'.join(flash.KINDS)}): {_flash()}")
    for name in sorted(OPERATORS):
        served = (f"{device}: {_serving(name, device)}" for device in devices)
        print(f"  {name:32} {', '.join(served)}")
