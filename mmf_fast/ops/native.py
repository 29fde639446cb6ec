"""The C++ kernels of csrc/, loaded on first use.

They are built by setup.py as mmf_fast/_C_<instruction set>.so and register themselves as torch.ops.mmf_fast_native.*.
The library must have been built for this processor's instruction set and, since it is linked against torch, for a
torch whose C++ interface it matches; otherwise it is not used, and `reason()` says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["available", "op", "reason"]

SETS = ("avx512", "avx2", "default")


def available() -> bool:
    """Whether the C++ kernels are here and this processor can run them."""
    return not reason()


@functools.cache
def reason() -> str:
    """Why the C++ kernels are not used: empty when they are."""
    folder = Path(__file__).parent.parent
    here = torch.backends.cpu.get_cpu_capability().lower()
    usable = SETS[SETS.index(here) :] if here in SETS else ("default",)
    for name in usable:
        for path in sorted(folder.glob(f"_C_{name}.*")):
            try:
                torch.ops.load_library(str(path))
            except OSError as error:
                return f"{path.name} does not load ({str(error).splitlines()[0]}): build it again for this torch"
            return ""
    found = ", ".join(path.name for path in sorted(folder.glob("_C_*.so")))
    if found:
        return f"{found} needs another processor (this one has {here}): build it again here"
    return "not built (pip install --no-build-isolation -e . builds it where there is a C++ compiler)"


@functools.cache
def op(name: str) -> Callable[..., Any] | None:
    """The C++ kernel `name`, or None."""
    return getattr(torch.ops.mmf_fast_native, name, None) if available() else None
