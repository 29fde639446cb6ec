"""Wheels for a machine without network: python -m benchmarks.gpu.wheels FOLDER [--python 3.12] (make wheels)

What an image with CUDA and PyTorch may lack: all of them together take less than 64 MB, most are pure Python.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

BINARY = [
    *("omegaconf", "pyyaml", "hjson", "pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    *("typing-extensions", "py-cpuinfo", "msgpack", "einops", "ninja", "nvtx", "packaging", "tqdm", "psutil"),
    *("pytest", "pytest-timeout", "pytest-xdist", "execnet", "iniconfig", "pluggy", "hypothesis", "sortedcontainers"),
    *("safetensors", "tensorboard", "tensorboard-data-server", "absl-py", "grpcio", "markdown", "protobuf", "werkzeug"),
    *("markupsafe", "pillow"),
]
SOURCES = ["deepspeed"]  # published without a wheel; its operators are left out, we use none of them
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
    """Installs the wheels of what is missing here, or older, into `target`; returns their names.

    Raises ValueError for a folder without wheels.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ValueError(f"--wheels {folder}: no wheels there; make wheels")
    wanted = [wheel for wheel in wheels if _newer(*wheel.name.split("-")[:2])]
    if wanted:
        options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", f"--target={target}"]
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *options]
        subprocess.run([*command, *map(str, wanted)], check=True)
    names = [wheel.name.split("-")[0] for wheel in wanted]
    print(f"from {folder}: {', '.join(names) or 'nothing is missing'}", flush=True)
    return names


def _newer(name: str, version: str) -> bool:
    try:
        here = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return True
    return _numbers(version) > _numbers(here)


def _numbers(version: str) -> list[int]:
    return [int("".join(filter(str.isdigit, part)) or 0) for part in version.split("+")[0].split(".")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the machine they are for (3.12)")
    options = parser.parse_args()
    fetch(options.folder, options.python)
