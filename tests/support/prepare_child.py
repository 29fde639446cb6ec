"""What tests/data/test_prepare.py runs in processes that it kills: each a function of its own, found by name there."""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.clean_server import processes

from mmf_fast.data import writer
from mmf_fast.data.formats import DataError
from mmf_fast.data.prepare import prepare


def in_child(work: Callable[..., None], *arguments: Any, until: Callable[[], bool] = lambda: False) -> int:
    """Runs work(*arguments) in a process of its own, kills it with SIGKILL once until() holds; its exit status, -9 if
    killed."""
    child, deadline = processes.Process(target=work, args=arguments), time.monotonic() + 120
    child.start()
    while child.is_alive() and not until():
        if time.monotonic() > deadline:
            child.kill()
            raise TimeoutError(f"{work.__name__} still ran after 120 s")
        time.sleep(0.001)
    child.kill()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def prepare_in_small_steps(source: Path, out: Path, workers: int = 1, latents: str | None = None) -> None:
    """Prepares, progress being written down every 128 samples."""
    writer._EVERY = 128
    prepare(source, out, workers=workers, latents=latents)


def prepare_and_die_at_the_manifest(source: Path, out: Path, written: bool) -> None:
    """Prepares, and exits with status 9 just before the manifest is written, or just after."""
    real = writer.write_text

    def dies(path: Path, text: str) -> None:
        if path.name != "manifest.json" or written:
            real(path, text)
        if path.name == "manifest.json":
            os._exit(9)

    writer.write_text = dies
    prepare(source, out)


def prepare_on_a_full_disk(source: Path, out: Path) -> None:
    """Prepares where files may not grow beyond 400 kB; exits with status 7 if the error says how to go on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
    writer._EVERY = 128
    try:
        prepare(source, out)
    except DataError as error:
        os._exit(7 if "mend that and start again: it goes on" in str(error) else 1)
