"""The README's performance table from a committed benchmark run: python -m benchmarks.report [--check]

Reads benchmarks/results/<device>/step.json, which `pytest benchmarks/step --benchmark-only --benchmark-json=...` wrote,
and replaces what stands between the two markers in README.md. With --check it only says whether they agree.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "step.json"
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"


def table(run: dict[str, Any]) -> str:
    """Markdown: one row per case, ratios to the flow-matching step of the same network and mode."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in run["benchmarks"]:
        kind, mode, name = benchmark["params"]["kind"], benchmark["params"]["mode"], benchmark["params"]["name"]
        rows.setdefault(name, {})[f"{kind}, {mode}"] = benchmark["extra_info"]
    columns = sorted({column for row in rows.values() for column in row})
    bounds = {name: next(iter(row.values()))["bound"] for name, row in rows.items()}
    lines = [
        f"| step time over flow matching | bound | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name, row in rows.items():
        cells = [f"{row[c]['ratio to flow matching']:.2f}" if c in row else "" for c in columns]
        lines.append(f"| {name} | {bounds[name]:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def header(run: dict[str, Any]) -> str:
    first = run["benchmarks"][0]["extra_info"]
    commit, machine = run["commit_info"], run["machine_info"]
    brand = machine.get("cpu", {}).get("brand_raw", machine.get("machine", ""))
    return (
        f"{first['device']} ({brand}, {first['threads']} threads), fp32, torch {first['torch']}, "
        f"commit {commit['id'][:9]}, {run['datetime'][:10]}. `pytest benchmarks/step --benchmark-only`; "
        f"raw figures: [{RESULTS.relative_to(ROOT)}]({RESULTS.relative_to(ROOT)})."
    )


def section() -> str:
    if not RESULTS.exists():
        return f"{BEGIN}\nNo run is committed yet. `make bench` measures every row on your machine.\n{END}"
    run = json.loads(RESULTS.read_text())
    return f"{BEGIN}\n{header(run)}\n\n{table(run)}\n{END}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare, exit status 1 when they differ")
    check = parser.parse_args().check
    text = README.read_text()
    before, rest = text.split(BEGIN)
    current = before + section() + rest.split(END)[1]
    if check:
        return int(current != text)
    README.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
