"""Wheels for a machine without network: python -m benchmarks.gpu.wheels FOLDER [--python 3.12] (make wheels)

What an image with CUDA and PyTorch may lack: all of them together take less than 64 MB, most are pure Python. They are
installed there by what is among them: of Python's packages nothing but pip is needed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

BINARY = [
    *("omegaconf", "pyyaml", "hjson", "pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    *("typing-extensions", "py-cpuinfo", "msgpack", "einops", "ninja", "nvtx", "packaging", "tqdm", "psutil"),
    *("pytest", "pytest-timeout", "pytest-xdist", "execnet", "iniconfig", "pluggy", "pygments", "hypothesis"),
    *("sortedcontainers", "safetensors", "tensorboard", "tensorboard-data-server", "absl-py", "grpcio", "markdown"),
    *("protobuf", "werkzeug", "markupsafe", "pillow"),
]
# Published without a wheel; its operators are left out, we use none of them. The range is that of pyproject.toml.
SOURCES = ["deepspeed>=0.19,<0.20"]
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
WITH_TORCH = {"torch", "numpy", "setuptools"}  # an image with PyTorch has them


def fetch(folder: Path, python: str) -> None:
    """Downloads the wheels, and builds those that are published as sources only.

    Raises ValueError where one of them needs what is not among them.
    """
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    platforms = [f"--platform={name}" for name in PLATFORMS]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *platforms]
    subprocess.run([*pip, "download", "--no-deps", *target, f"--dest={folder}", *BINARY], check=True)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", *SOURCES],
        env=os.environ | {"DS_BUILD_OPS": "0"},
        check=True,
    )
    wheels = wheels_of(folder)
    needed = {_canonical(need.name) for path in wheels.values() for need in _needs(path, python)}
    if absent := needed - wheels.keys() - WITH_TORCH:
        raise ValueError(f"{folder}: others there need {', '.join(sorted(absent))}; add them to BINARY")
    size = sum(path.stat().st_size for path in wheels.values())
    print(f"{folder}: {len(wheels)} wheels, {size / 1e6:.0f} MB")


def wheels_of(folder: Path) -> dict[str, Path]:
    """The wheels of a folder by the names of their packages."""
    return {_canonical(path.name.partition("-")[0]): path for path in sorted(folder.glob("*.whl"))}


def install(folder: Path, target: Path) -> list[str]:
    """Installs into `target` the wheels of what is missing here, and of what these need newer than it is here; returns
    their names. Whatever else the machine has stays as it is.

    Raises ValueError for a folder without wheels.
    """
    wheels = wheels_of(folder)
    if not wheels:
        raise ValueError(f"--wheels {folder}: no wheels there; make wheels")
    here = {name: _version(name) for name in wheels}
    wanted = [name for name, version in here.items() if version is None]
    if "packaging" in wanted:
        sys.path.append(str(wheels["packaging"]))  # a wheel can be imported as it is: what reads requirements below
    for name in wanted:  # it grows
        for needed in _needs(wheels[name]):
            other = _canonical(needed.name)
            if other in wheels and other not in wanted and not needed.specifier.contains(str(here[other]), True):
                wanted.append(other)
    if wanted:
        options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", f"--target={target}"]
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *options]
        subprocess.run([*command, *(str(wheels[name]) for name in wanted)], check=True)
    print(f"from {folder}: {', '.join(wanted) or 'nothing is missing'}", flush=True)
    return wanted


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _canonical(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def _needs(wheel: Path, python: str | None = None) -> list[Requirement]:
    """What a wheel says it requires, without extras: here, or on the Python of that version."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    found = [Requirement(line.partition(":")[2].strip()) for line in lines if line.startswith("Requires-Dist:")]
    there = {"extra": ""} | ({"python_version": python} if python else {})
    return [needed for needed in found if needed.marker is None or needed.marker.evaluate(there)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the machine they are for (3.12)")
    options = parser.parse_args()
    try:
        fetch(options.folder, options.python)
    except ValueError as error:
        sys.exit(f"error: {error}")
