"""From a sweep to the defaults: python -m benchmarks.gpu.defaults benchmarks/results/<device>/tiles.json [--write]

Prints the entries of mmf_fast/ops/tiles.py that the sweep changes; with --write it puts them there.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Row
from mmf_fast.ops import tiles
from mmf_fast.ops.autotune import chip
from mmf_fast.ops.tiles import Config

Table = dict[str, dict[tuple[int, int, str], Config]]  # as mmf_fast.ops.tiles.TILES
BLOCK = re.compile(r"^TILES: .*?^}\n", re.MULTILINE | re.DOTALL)


def fastest(run: dict[str, Any]) -> Table:
    """For each kernel, head size and numbers the configuration that does best over all sizes that were measured: by the
    geometric mean of its times over those of the best there, among those measured at most sizes."""
    times: dict[tuple[str, int, str], dict[tuple[int, ...], dict[Config, float]]] = {}
    for row in run["rows"]:
        if "error" not in row:
            sizes = times.setdefault((row["kernel"], row["d"], row["numbers"]), {})
            sizes.setdefault(_size(row), {})[Config(*row["config"])] = row["seconds"]
    found: Table = {}
    for (kernel, d, numbers), sizes in times.items():
        losses: dict[Config, list[float]] = {}
        for at_size in sizes.values():
            for config, seconds in at_size.items():
                losses.setdefault(config, []).append(math.log(seconds / min(at_size.values())))
        best = min(losses, key=lambda config: (-len(losses[config]), sum(losses[config])))
        found.setdefault(kernel, {})[chip(tuple(run["machine"]["capability"])), d, numbers] = best
    return found


def _size(row: Row) -> tuple[int, ...]:
    return row["batch"], row["heads"], row["tokens"]


def changes(table: Table, found: Table) -> list[str]:
    """A line for each entry that a sweep changes or adds."""
    return [
        f"{kernel}, chip {key[0]}, head size {key[1]}, {key[2]}: {_text(table[kernel].get(key))} -> {_text(config)}"
        for kernel, entries in found.items()
        for key, config in entries.items()
        if table[kernel].get(key) != config
    ]


def merged(table: Table, found: Table) -> Table:
    """The table with what a sweep found, by numbers, chip and head size."""
    whole = {kernel: entries | found.get(kernel, {}) for kernel, entries in table.items()}
    return {
        kernel: dict(sorted(entries.items(), key=lambda entry: (entry[0][2], entry[0][0], entry[0][1])))
        for kernel, entries in whole.items()
    }


def rewritten(source: str, table: Table) -> str:
    """The module's source with this table. Raises ValueError where it has none."""
    lines = ["TILES: dict[str, dict[tuple[int, int, str], Config]] = {"]
    for kernel, entries in table.items():
        body = [f'        ({c}, {d}, "{n}"): Config({_text(config)}),' for (c, d, n), config in entries.items()]
        lines += [f'    "{kernel}": {{', *body, "    },"]
    result, count = BLOCK.subn(lambda _: "\n".join([*lines, "}\n"]), source)
    if count != 1:
        raise ValueError("mmf_fast/ops/tiles.py: there is no table TILES to write")
    return result


def _text(config: Config | None) -> str:
    return "none" if config is None else ", ".join(map(str, config))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path, help="tiles.json of a device")
    parser.add_argument("--write", action="store_true", help="change mmf_fast/ops/tiles.py")
    options = parser.parse_args(arguments)
    found = fastest(json.loads(options.sweep.read_text()))
    print("\n".join(changes(tiles.TILES, found)) or "no entry changes")
    if options.write:
        path = Path(tiles.__file__)
        path.write_text(rewritten(path.read_text(), merged(tiles.TILES, found)))
        print(f"written: {path}; pytest tests/ops/test_compile_gate.py says whether they fit every chip")
    return 0


if __name__ == "__main__":
    sys.exit(main())
