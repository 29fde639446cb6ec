"""Turns any known format into a prepared set: mmf prepare SRC OUT.

    mmf prepare cifar-10-python.tar.gz data/cifar10
    mmf prepare ILSVRC2012/train data/imagenet64 --size 64 --channels 3
    mmf prepare data/cifar10 --check

Memory stays bounded whatever the size of the set, except for the names of its files. A run that was stopped goes on
where it was, when started again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from mmf_fast.data.formats import FORMATS, DataError, Item, Options, SampleError, Source, identity_of, open_source
from mmf_fast.data.formats.latents import Contents
from mmf_fast.data.formats.layout import LABELS
from mmf_fast.data.prepared import MANIFEST, Manifest, read_manifest, verify
from mmf_fast.data.writer import Writer

__all__ = ["main", "prepare"]

_GROUP = 16  # a thread gets so many samples at a time: to hand over each one costs more than to copy a small image
_MAX_WORKERS = 32  # beyond it Python's global lock leaves nothing to gain


def prepare(
    source: str | Path,
    out: str | Path,
    format: str | None = None,
    num_classes: int | None = None,
    skip_bad: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Manifest:
    """Reads the set at `source` and writes it to the folder `out`; returns at once where that has been done.

    num_classes: where the source does not tell it (default: the largest label + 1).
    skip_bad: share of the samples that may fail to decode and are left out, named in the manifest.
    workers: threads that decode.  overwrite: replaces another set in `out`.  options: see `Options`.
    Raises DataError.
    """
    path, folder, chosen = Path(source), Path(out), Options(**options)
    given = {**chosen.given(), **({} if num_classes is None else {"num_classes": num_classes})}
    if path.resolve() == folder.resolve():
        raise DataError(f"{folder}: is the source itself, which stays as it is; pass another OUT")
    try:
        if overwrite:
            (folder / MANIFEST).unlink(missing_ok=True)
        elif (folder / MANIFEST).exists() and path.exists():
            return _same(folder, read_manifest(folder), _origin(path, format, identity_of(path, chosen.ignore), given))
        opened = open_source(path, format, **options)
        if num_classes is not None:
            if opened.classes is not None and len(opened.classes) != num_classes:
                raise DataError(
                    f"{path}: names {len(opened.classes)} classes, --num-classes says {num_classes}; leave it out, or "
                    "let the source hold all of them (--allow-empty keeps empty folders)"
                )
            opened = replace(opened, num_classes=num_classes)
        told = f"{path}: {opened.rule}{_listed('; images: ', opened.looks)}{_listed('; not taken: ', opened.left_out)}"
        tqdm.write(told, file=sys.stderr)
        with Writer(folder, opened, given) as writer:
            _copy(opened, writer, skip_bad, workers or min(os.cpu_count() or 1, _MAX_WORKERS))
            return writer.finish(_origin(path, opened.format, opened.identity, given))
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: {error.strerror or error}; mend that and start again: it goes on"
        ) from error


def _origin(path: Path, format: str | None, identity: str, given: dict[str, Any]) -> dict[str, Any]:
    return {"path": str(path.resolve()), "format": format, "identity": identity, **given}


def _same(folder: Path, found: Manifest, origin: dict[str, Any]) -> Manifest:
    """The manifest of a set that was prepared before, if it is of this origin. Raises DataError."""
    origin = {**origin, "format": origin["format"] or found.source["format"]}
    if found.source != json.loads(json.dumps(origin)):
        raise DataError(f"{folder}: holds another prepared set; pass another OUT, or --overwrite")
    return found


def _copy(source: Source, writer: Writer, skip_bad: float, workers: int) -> None:
    if writer.seen:
        tqdm.write(f"{writer.folder}: going on after {writer.seen} samples", file=sys.stderr)
    items = islice(source.items(), writer.seen, None)
    bar = tqdm(total=source.count, initial=writer.seen, desc=f"preparing {source.format}", unit="sample")
    with bar, closing(_loaded(items, workers)) as loaded:
        for item, result in loaded:
            bar.update()
            if isinstance(result, np.ndarray):
                writer.add(item, result)
                continue
            if skip_bad == 0:
                raise DataError(f"{result}; mend or remove it, or pass --skip-bad SHARE to leave such samples out")
            tqdm.write(f"left out: {result}", file=sys.stderr)
            writer.skip(item)
            if source.count is not None:
                _check_share(writer, source.count, skip_bad)
    _check_share(writer, writer.seen, skip_bad)
    if source.count is not None and writer.seen != source.count:
        raise DataError(f"{writer.seen} samples were found, {source.count} announced; fetch the source again")


def _check_share(writer: Writer, total: int, share: float) -> None:
    if len(writer.skipped) > share * total:
        raise DataError(
            f"{len(writer.skipped)} of {total} samples cannot be read, more than --skip-bad {share}; the last one is "
            f"{writer.skipped[-1]}; fetch the source again"
        )


def _loaded(items: Iterable[Item], workers: int) -> Generator[tuple[Item, np.ndarray | SampleError], None, None]:
    """Items and what they load to, in order; a few are decoded ahead."""

    def load(some: list[Item]) -> list[tuple[Item, np.ndarray | SampleError]]:
        result: list[tuple[Item, np.ndarray | SampleError]] = []
        for item in some:
            try:
                result.append((item, item.load()))
            except SampleError as error:
                result.append((item, error))
        return result

    iterator = iter(items)
    groups = iter(lambda: list(islice(iterator, _GROUP)), [])
    if workers == 1:
        for group in groups:
            yield from load(group)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[list[tuple[Item, np.ndarray | SampleError]]]] = deque()
        for group in groups:
            waiting.append(pool.submit(load, group))
            if len(waiting) > workers + 2:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


# ---- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="mmf prepare",
        description="Turn a dataset into one memory-mapped array with labels and a manifest.",
    )
    result.add_argument("source", metavar="SRC", type=Path, help="archive or folder, as it was downloaded")
    result.add_argument("out", metavar="OUT", type=Path, nargs="?", help="folder of the prepared set")
    result.add_argument(
        "--check", action="store_true", help="SRC is a prepared set: compare its checksums, without OUT"
    )
    result.add_argument("--format", choices=FORMATS, help="default: detected")
    result.add_argument("--split", choices=("train", "validation"), default="train", help="where SRC holds both")
    result.add_argument("--root", metavar="FOLDER", help="the folder in SRC that holds the class folders; . is SRC")
    result.add_argument(
        "--ignore",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="files and folders to leave out; * is any",
    )
    result.add_argument("--labels", choices=LABELS, help="no labels, or by the folder that each file lies in")
    result.add_argument("--label-column", metavar="NAME", help="of a table")
    result.add_argument("--allow-empty", action="store_true", help="class folders without samples keep their number")
    result.add_argument("--size", type=_positive, help="centre-crop and resize images to this side (as ADM does)")
    result.add_argument("--channels", type=int, choices=(1, 3), help="where some images are greyscale and some are not")
    result.add_argument("--background", metavar="COLOUR", help="below transparent pixels: a name, #rrggbb, or none")
    result.add_argument("--latents", choices=get_args(Contents), help="what latents hold, where names do not tell")
    result.add_argument("--num-classes", type=_positive, help="where SRC does not tell; default: largest label + 1")
    result.add_argument("--skip-bad", type=float, default=0.0, metavar="SHARE", help="leave out this share at most")
    result.add_argument("--workers", type=_positive, help="threads that decode; default: one per core")
    result.add_argument("--overwrite", action="store_true", help="replace another set in OUT")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 130 interrupted. Raises DataError."""
    options = vars(parser().parse_args(arguments))
    check, options["ignore"] = options.pop("check"), tuple(options["ignore"])
    try:
        if check and options["out"] is not None:
            raise DataError(f"--check is for one prepared set: mmf prepare {options['out']} --check, without SRC")
        if check:
            folder, manifest = options["source"], verify(options["source"])
        elif options["out"] is None:
            raise DataError("OUT is missing: the folder to write to")
        else:
            folder, manifest = options["out"], prepare(**options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    shape = "x".join(map(str, manifest.shape))
    classes = f", {manifest.num_classes} classes" if manifest.num_classes else ", no labels"
    skipped = f", {len(manifest.skipped)} left out" if manifest.skipped else ""
    if manifest.report.get("classes"):
        print(_census(manifest.report["classes"]), file=sys.stderr)
    print(f"{folder}: {manifest.count} {manifest.kind} {shape}{classes}{skipped}{', whole' if check else ''}")
    return 0


def _census(counts: dict[str, int]) -> str:
    """Samples of each class, of the smallest ones where there are many."""
    ordered = sorted(counts.items(), key=lambda entry: entry[1])
    shown = counts.items() if len(counts) <= 20 else ordered[:3]
    low, high = ordered[0], ordered[-1]
    names = ", ".join(f"{name} {count}" for name, count in shown) + ", ..." * (len(counts) > 20)
    return f"{len(counts)} classes: {names}; smallest {low[0]} {low[1]}, largest {high[0]} {high[1]}"


def _listed(before: str, counts: dict[str, int]) -> str:
    return before + ", ".join(f"{count} {kind}" for kind, count in counts.items()) if counts else ""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value
