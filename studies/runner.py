"""Runs a study: each setting with each seed, of which every result is kept at once.

    python -m studies.NAME               goes on where it was stopped, then writes docs/results.md and its figure
    python -m studies.NAME --list        its runs and their cost, and which of them are done
    python -m studies.NAME --minutes 30  starts no run after that time
    python -m studies.NAME --quick       a rehearsal of less than a minute, which leaves nothing behind

A row of studies/results/NAME.json is one run, known by its setting and its seed: where the code gives a setting another
meaning, its rows must go.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmf_fast.files import write_text
from studies import STUDIES
from studies.rows import Row, Rows, Setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RESULTS", "ROOT", "Study", "all_studies", "main", "missing", "read", "remaining"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "studies" / "results"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the runs that answer it, and how they are told.

    name: of its module. title: of its chapter. question: one sentence.
    settings: plain dicts, what matters most first; each run with seeds 0, 1, ... `seeds - 1`.
    run: (setting, seed, quick) -> figures by name; one that is not finite says that the run diverged. quick: do the
        same in a second or two, whatever it is worth.
    seconds: what a run of a setting takes, about.
    method: what is trained and measured.  draw: the figure.  doubt: what would change the answer.
    answer: text in Markdown that begins with words, every number of it made from the rows, of which there may be any
        part.
    recommend: what the rows advise, as a clause of the sentence on top of the page; "" where they are too few.
    rehearsal: the settings that --quick runs; by default the first and the last.
    """

    name: str
    title: str
    question: str
    settings: Sequence[Setting]
    run: Callable[[Setting, int, bool], Mapping[str, float]]
    seconds: Callable[[Setting], float]
    method: str
    draw: Callable[[Rows], Figure]
    answer: Callable[[Rows], str]
    doubt: str
    recommend: Callable[[Rows], str] | None = None
    rehearsal: Sequence[Setting] = ()
    seeds: int = 3


def all_studies() -> list[Study]:
    return [importlib.import_module(f"studies.{name}").STUDY for name in STUDIES]


# ---- rows ------------------------------------------------------------------------------------------------------------


def read(study: Study, folder: Path = RESULTS) -> Rows:
    """The rows of the runs that the study declares now."""
    path = folder / f"{study.name}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return Rows(row for row in rows if row["setting"] in study.settings and row["seed"] < study.seeds)


def missing(study: Study, rows: Rows) -> list[tuple[Setting, int]]:
    """Settings and seeds without a row; all seeds of a setting come before the next."""
    done = [(row["setting"], row["seed"]) for row in rows]
    return [(setting, seed) for setting in study.settings for seed in range(study.seeds) if (setting, seed) not in done]


def remaining(study: Study, rows: Rows) -> float:
    """Seconds that the missing runs take, about."""
    return sum(study.seconds(setting) for setting, _ in missing(study, rows))


def _keep(row: Row, path: Path) -> None:
    """Adds a row to what is there now, perhaps by another process too; a line each, for whoever compares versions."""
    rows = [*(json.loads(path.read_text()) if path.exists() else []), row]
    write_text(path, "[\n" + ",\n".join(json.dumps(each) for each in rows) + "\n]\n")


def _one_run(study: Study, setting: Setting, seed: int, quick: bool) -> Row:
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time  # a CPU may have other work to do
    where, start = _where(), clock()  # files may change while it runs
    figures = study.run(setting, seed, quick)
    seconds = clock() - start
    return {
        "setting": setting,
        "seed": seed,
        "figures": {name: round_(value) for name, value in figures.items()},
        "seconds": round(seconds, 1),
        "date": datetime.date.today().isoformat(),
        **where,
    }


def round_(value: float) -> float | None:
    """Six digits; None, which is JSON, for what is not finite."""
    return float(f"{float(value):.6g}") if math.isfinite(value) else None


def _where() -> dict[str, Any]:
    """Commit (with a + where files differ from it), PyTorch and device."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = "+" if git("status", "--porcelain", "--untracked-files=no", "--", "mmf_fast", "studies/*.py") else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    return {"commit": git("rev-parse", "--short", "HEAD") + changed, "torch": torch.__version__, "device": device}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


# ---- command line ----------------------------------------------------------------------------------------------------


def main(study: Study, arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m studies.{study.name}", description=study.question)
    parser.add_argument("--list", action="store_true", help="show the runs and their cost, and stop")
    parser.add_argument("--quick", action="store_true", help="rehearse in less than a minute, leaving nothing behind")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
    options = parser.parse_args(arguments)
    if options.quick:
        rehearse(study)
        return
    show(study, read(study))
    if not options.list:
        go_on(study, options.minutes)


def show(study: Study, rows: Rows) -> None:
    print(f"{study.question}\n{len(study.settings)} settings x {study.seeds} seeds")
    left = missing(study, rows)
    for setting in study.settings:
        done = study.seeds - sum(each == setting for each, _ in left)
        words = ", ".join(f"{key} {value}" for key, value in setting.items())
        print(f"  {done} of {study.seeds} done, {study.seconds(setting):4.0f} s a run: {words}")
    print(f"{len(left)} runs to do, about {remaining(study, rows) / 60:.1f} minutes", flush=True)


def go_on(study: Study, minutes: float = math.inf, folder: Path = RESULTS, quick: bool = False) -> Rows:
    """Does the missing runs, in turn, until the time is over."""
    end = time.monotonic() + 60 * minutes
    left = missing(study, read(study, folder))
    for number, (setting, seed) in enumerate(left, 1):
        if time.monotonic() > end:
            print(f"{len(left) - number + 1} runs are left; the same command goes on")
            break
        row = _one_run(study, setting, seed, quick)
        _keep(row, folder / f"{study.name}.json")
        figures = ", ".join(f"{name} {value}" for name, value in row["figures"].items())
        print(f"{number}/{len(left)} {dict(setting)} seed {seed}: {figures} ({row['seconds']} s)", flush=True)
    if folder == RESULTS:
        from studies import report

        report.write()
    return read(study, folder)


def rehearse(study: Study) -> None:
    """A few runs from end to end, in a folder that goes away: rows, text and figure."""
    from dataclasses import replace

    from studies import report

    few = replace(study, settings=study.rehearsal or (study.settings[0], study.settings[-1]), seeds=2)
    with tempfile.TemporaryDirectory() as folder:
        rows = go_on(few, folder=Path(folder), quick=True)
        report.save_figure(few, rows, Path(folder))
        print(report.chapter(few, rows))
