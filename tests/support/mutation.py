"""A pytest plugin that spoils one kernel, to prove that some test notices: pytest -p support.mutation with, in the
environment, MMF_FAST_MUTATE=operator:kind:place:dtype, a result of what the kernel of that kind returns.

A float32 result is off by a relative 1e-3, a 16-bit one by four times the distance of two numbers of its type.
The file MMF_FAST_MUTATED is there afterwards if there was such a result.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmf_fast.ops import dispatch

NAME, KIND, PLACE, DTYPE = os.environ["MMF_FAST_MUTATE"].split(":")
dtype = getattr(torch, DTYPE)
OFF = 1e-3 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps

implementation = dispatch.implementation


def spoilt(name: str, kind: str) -> Callable[..., Any]:
    found = implementation(name, kind)
    if (name, kind) != (NAME, KIND):
        return found

    def run(*args: Any) -> Any:
        out = found(*args)
        results = list(out) if isinstance(out, (tuple, list)) else [out]
        x = results[int(PLACE)]
        if x.dtype == dtype and x.numel():
            results[int(PLACE)] = (x.double() * (1 + OFF)).to(dtype)
            Path(os.environ["MMF_FAST_MUTATED"]).touch()
        return tuple(results) if isinstance(out, tuple) else results if isinstance(out, list) else results[0]

    return run


dispatch.implementation = spoilt  # type: ignore[assignment]
