"""The FlashAttention that serves PyTorch's attention here: the best that is installed, put in place once.

Attention of plain tensors (samples at r = t, sampling) and the backward pass of the attention operator at lambda = 0
are plain attention, which others have written best. In order of preference:

    FA3     the package of flash-attention's hopper folder (flash_attn_interface), on Hopper
    FA4     the package flash-attn-4 (flash_attn.cute), on Hopper and Blackwell
    cudnn   cuDNN's, which PyTorch ships, on Hopper and Blackwell
    FA2     FlashAttention 2, which PyTorch ships, from Ampere on

3 and 4 enter through PyTorch's own registry (torch.nn.attention.activate_flash_attention_impl, torch 2.11). The
commands choose as they choose their device; a program that imports the package calls `activate`, since it is the
attention of the whole process that changes. MMF_FAST_FLASH=FA2|FA3|FA4|cudnn in the environment forces one. `mmf ops`
prints which serves, and why.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch.nn import attention

__all__ = ["KINDS", "Choice", "activate", "serving"]

KINDS = ("FA3", "FA4", "cudnn", "FA2")
_PACKAGES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute.interface"}
_CHIPS = {"FA3": (9,), "FA4": (9, 10), "cudnn": (9, 10), "FA2": (8, 9, 10, 11, 12)}  # major compute capabilities


class Choice(NamedTuple):
    kind: str  # one of KINDS, or another that the program has registered with PyTorch
    reason: str


_serving: Choice | None = None


def serving() -> str:
    """What serves now: FA2, as PyTorch comes, until something else has been put in its place."""
    return _current_implementation() or (_serving.kind if _serving else "FA2")


def activate(device: torch.device) -> Choice | None:
    """Puts the best FlashAttention for this CUDA device in place, for the whole process; None for other devices.

    What the program itself has activated in PyTorch stays, unless MMF_FAST_FLASH names another. Raises ValueError when
    that does not exist or cannot serve here.
    """
    global _serving
    wanted = os.environ.get("MMF_FAST_FLASH")
    if wanted and wanted not in KINDS:
        raise ValueError(f"MMF_FAST_FLASH is {wanted!r}: choose one of {', '.join(KINDS)}")
    if device.type != "cuda":
        return None
    if _serving is not None and wanted in (None, _serving.kind):
        return _serving
    if not wanted and (own := _current_implementation()):
        return Choice(own, "this program has activated it in PyTorch")
    major = torch.cuda.get_device_capability(device)[0]
    refused: list[str] = []
    for kind in (wanted,) if wanted else KINDS:
        if not (problem := _why_not(kind, major) or _put_in_place(kind)):
            reason = "MMF_FAST_FLASH" if wanted else "; ".join(refused) or "the fastest on this chip"
            _serving = Choice(kind, reason)
            return _serving
        refused.append(f"{kind}: {problem}")
    if wanted:
        raise ValueError(f"MMF_FAST_FLASH={wanted} cannot serve here, {refused[0]}: unset it")
    return Choice("none", "; ".join(refused))


def _why_not(kind: str, major: int) -> str:
    """Why a kind cannot serve a chip of this major compute capability; empty if it can."""
    if major not in _CHIPS[kind]:
        return f"not for compute capability {major}"
    if kind == "cudnn":
        return "" if torch.backends.cudnn.is_available() else "this torch has no cuDNN"
    if kind == "FA2":
        return "" if torch.backends.cuda.is_flash_attention_available() else "this torch was built without it"
    if kind not in getattr(attention, "list_flash_attention_impls", list)():
        return "this torch cannot register it (2.11 can)"
    return "" if _installed(_PACKAGES[kind]) else f"{_PACKAGES[kind]} is not installed"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        return False


def _put_in_place(kind: str) -> str:
    """Makes PyTorch's attention try this kind first. Returns why it could not; empty if it did."""
    if kind in _PACKAGES:
        try:
            attention.activate_flash_attention_impl(kind)
        except (ImportError, RuntimeError, OSError) as error:  # built for another torch or CUDA
            return f"it does not load ({' '.join(str(error).split())})"
    elif _current_implementation():
        attention.restore_flash_attention_impl()
    backends: Any = attention.SDPBackend
    first = int(backends.CUDNN_ATTENTION if kind == "cudnn" else backends.FLASH_ATTENTION)
    others = [backend for backend in torch._C._get_sdp_priority_order() if backend != first]
    torch._C._set_sdp_priority_order([first, *others])
    return ""


def _current_implementation() -> str | None:
    return getattr(attention, "current_flash_attention_impl", lambda: None)()
