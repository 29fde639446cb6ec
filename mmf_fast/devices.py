"""Devices: which one to take, and what a GPU can do at best, by the name the driver gives it.

Its peak is the denominator of model FLOPs utilisation: FLOP/s of dense matrix products, per GPU. NVIDIA's data sheets
print twice the tensor-core figures ("with sparsity"); these are the halves:

    A100   NVIDIA A100 data sheet (SXM and PCIe alike)          H100   NVIDIA H100 data sheet (SXM, NVL, PCIe)
    H200   NVIDIA H200 data sheet (SXM, NVL)                    GH200  NVIDIA GH200 data sheet
    B200, GB200   NVIDIA Blackwell data sheet (HGX B200 at 1,000 W, GB200 at 1,200 W)

Precisions are those of train.precision: bf16 and tf32 on the tensor cores, fp32 on the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmf_fast.ops import flash

__all__ = ["PEAK_FLOPS", "choose_device", "device_of", "peak_flops"]

# The first name all of whose words are in the driver's is the one, so variants come before the plain name.
PEAK_FLOPS: dict[str, dict[str, float]] = {
    "GB200": {"bf16": 2500e12, "tf32": 1250e12, "fp32": 80e12},
    "B200": {"bf16": 2250e12, "tf32": 1100e12, "fp32": 75e12},
    "GH200": {"bf16": 989.5e12, "tf32": 494.5e12, "fp32": 67e12},
    "H200 NVL": {"bf16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12},
    "H200": {"bf16": 989.5e12, "tf32": 494.5e12, "fp32": 67e12},
    "H100 NVL": {"bf16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12},
    "H100 PCIe": {"bf16": 756.5e12, "tf32": 378e12, "fp32": 51e12},
    "H100": {"bf16": 989.5e12, "tf32": 494.5e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
}


def peak_flops(device: str | torch.device, precision: str) -> float | None:
    """FLOP/s of a device at a precision of train.precision; None where it is not known: CPUs, other GPUs, MIG slices.

    device: as the driver names it ("NVIDIA H100 80GB HBM3", or just "H100"), or the torch device itself.
    Raises KeyError for another precision.
    """
    if isinstance(device, torch.device):
        device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    words = device.replace("-", " ").split()
    if "MIG" in words:
        return None
    for name, peaks in PEAK_FLOPS.items():
        if set(name.split()) <= set(words):
            return peaks[precision]
    return None


def choose_device(name: str) -> torch.device:
    """The torch device of that name, with the best FlashAttention for it in place (mmf_fast.ops.flash).

    "auto" is CUDA where there is one, else the CPU; "cuda" is the current one, with its index, which
    torch.cuda.set_device and a comparison with the device of a tensor need. Raises ValueError.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tensor = torch.empty(0, device=name)  # a tensor knows its index
        if tensor.is_meta:
            raise RuntimeError("tensors there have no content")
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used here ({why}): choose auto, or one that is there") from error
    flash.activate(tensor.device)
    return tensor.device


def device_of(net: Any) -> torch.device | None:
    """The device of a network's first parameter; None for a callable without parameters."""
    parameter = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    return None if parameter is None else parameter.device
