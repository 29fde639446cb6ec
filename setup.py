"""Package build; the metadata is in pyproject.toml.

The package is pure Python: it installs as an ordinary wheel, without a compiler and without a GPU. Where a compiler
and torch are at hand (`pip install --no-build-isolation -e .`), the CPU kernels of csrc/ are built beside it, one
library per instruction set, named after it: an editable install (or MMF_FAST_NATIVE=1) is for this machine alone, a
wheel carries AVX2 and AVX512 on x86. mmf_fast/ops/native.py loads the one that fits. A build that fails is reported
and skipped. MMF_FAST_NATIVE=0 skips it.
"""

import os
import platform
import sys
from glob import glob
from typing import Any

from setuptools import setup

FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "default": [],
}


def instruction_sets() -> list[str]:
    import torch

    here = torch.backends.cpu.get_cpu_capability().lower()
    this_machine = "editable_wheel" in sys.argv or os.environ.get("MMF_FAST_NATIVE") == "1"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and not this_machine:
        return ["avx2", "avx512"]
    return [here if here in FLAGS else "default"]


def native_build() -> dict[str, Any]:
    """ext_modules and cmdclass of the CPU kernels; nothing without torch or sources."""
    sources = sorted(glob("csrc/*.cpp"))
    if not sources or os.environ.get("MMF_FAST_NATIVE") == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}

    class OptionalBuild(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (Exception, SystemExit) as error:
                print(f"mmf_fast: CPU kernels not built, the reference serves instead: {error}", file=sys.stderr)
                self.extensions = []

    openmp = ["-fopenmp"] if sys.platform.startswith("linux") else []
    extensions = [
        CppExtension(
            f"mmf_fast._C_{name}",
            sources,
            depends=glob("csrc/*.h"),
            extra_compile_args=[
                "-O3",
                "-g0",
                "-fvisibility=hidden",  # calls between functions of ours need no table, and no other library meets them
                "-fno-math-errno",
                "-fno-trapping-math",
                f"-DCPU_CAPABILITY={name.upper()}",
                f"-DCPU_CAPABILITY_{name.upper()}",
                *openmp,
                *FLAGS[name],
            ],
            extra_link_args=openmp,
        )
        for name in instruction_sets()
    ]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": OptionalBuild.with_options(no_python_abi_suffix=True)}}


setup(
    data_files=[("share/mmf_fast/configs", sorted(glob("configs/*.yaml") + glob("configs/*.json")))],
    **native_build(),
)
