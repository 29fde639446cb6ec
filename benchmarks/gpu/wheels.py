"""Wheels for a machine without network: python -m benchmarks.gpu.wheels FOLDER [--python 3.12] (make wheels)

What an image with CUDA and PyTorch may lack: all of them together take less than 64 MB, most are pure Python.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

BINARY = [
    *("omegaconf", "pyyaml", "hjson", "pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    *("typing-extensions", "py-cpuinfo", "msgpack", "einops", "ninja", "nvtx", "packaging", "tqdm", "psutil"),
    *("pytest", "pytest-timeout", "pytest-xdist", "execnet", "iniconfig", "pluggy", "hypothesis", "sortedcontainers"),
    *("safetensors", "tensorboard", "tensorboard-data-server", "absl-py", "grpcio", "markdown", "protobuf", "werkzeug"),
    *("markupsafe", "pillow"),
]
# Published without a wheel; its operators are left out, we use none of them. The range is that of pyproject.toml.
SOURCES = ["deepspeed>=0.19,<0.20"]
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def fetch(folder: Path, python: str) -> None:
    """Downloads the wheels, and builds those that are published as sources only."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    platforms = [f"--platform={name}" for name in PLATFORMS]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *platforms]
    subprocess.run([*pip, "download", "--no-deps", *target, f"--dest={folder}", *BINARY], check=True)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", *SOURCES],
        env=os.environ | {"DS_BUILD_OPS": "0"},
        check=True,
    )
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {size / 1e6:.0f} MB")


def install(folder: Path, target: Path) -> list[str]:
    """Installs into `target` the wheels of what is missing here, and of what these need newer than it is here; returns
    their names. Whatever else the machine has stays as it is.

    Raises ValueError for a folder without wheels.
    """
    wheels = {str(parse_wheel_filename(path.name)[0]): path for path in sorted(folder.glob("*.whl"))}
    if not wheels:
        raise ValueError(f"--wheels {folder}: no wheels there; make wheels")
    wanted = [name for name in wheels if _version(name) is None]
    for name in wanted:  # it grows
        for needed in _needs(wheels[name]):
            other = canonicalize_name(needed.name)
            if other in wheels and other not in wanted and not needed.specifier.contains(str(_version(other)), True):
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


def _needs(wheel: Path) -> list[Requirement]:
    """What a wheel says it requires here, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    found = [Requirement(line.partition(":")[2].strip()) for line in lines if line.startswith("Requires-Dist:")]
    return [needed for needed in found if needed.marker is None or needed.marker.evaluate({"extra": ""})]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the machine they are for (3.12)")
    options = parser.parse_args()
    fetch(options.folder, options.python)
