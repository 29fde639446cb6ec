"""A CUDA driver that is not there: launches go the whole way through the package and Triton, and are only counted.

Triton's binder and its specialisation on types, alignment and ones are the real ones; CPU tensors stand for those of a
GPU, with addresses that align as theirs would. A variant is what the compiler is asked for; what it makes of it is
tested elsewhere (compile_gate.py), so nothing is compiled unless `compiling`. Only for processes without
TRITON_INTERPRET.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    kernel: str  # module.function
    variant: int  # in the order in which they are met
    grid: tuple[int, ...]


class Driver:
    """As much of triton.backends.nvidia.driver.CudaDriver as a launch asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Kernel:
    """What a compiler would have returned."""

    function, packed_metadata = 1, ()

    def __init__(self, name: str, variant: int, launches: list[Launch]) -> None:
        self.name, self.variant, self.launches = name, variant, launches

    def launch_metadata(self, *args: Any) -> None: ...

    def run(self, x: int, y: int, z: int, *args: Any) -> None:
        self.launches.append(Launch(self.name, self.variant, (x, y, z)))


def install(capability: int = 90, compiling: bool = False) -> tuple[list[Launch], list[str]]:
    """Puts the driver in Triton's place for the rest of the process. Returns launches and, as text, variants."""
    launches: list[Launch] = []
    variants: list[str] = []

    def compile_one(
        self: Any, key: str, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> Kernel:
        if compiling:
            source = ASTSource(self, signature, constexprs, attrs)
            triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options.__dict__)
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        kernel = Kernel(name, len(variants), launches)
        variants.append(f"{name} {key}")
        self.device_caches[device][0][key] = kernel
        return kernel

    JITFunction._do_compile = compile_one
    driver.set_active(Driver(capability))
    return launches, variants
