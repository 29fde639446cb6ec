"""From committed runs to docs/performance.md and its plots: python -m benchmarks.report [--check]

Reads benchmarks/results/<device>/, what `make bench-full` wrote (full.json) and `make gpu` (a file per part), replaces
what stands between the two markers in docs/performance.md, and draws docs/performance_*.png. With --check it only says
whether page and runs agree.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, OURS
from benchmarks.gpu import report as gpu
from benchmarks.plots import draw
from benchmarks.results import Row, crossed, read, rows_of, share_of_roof
from mmf_fast.planning import table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"


def steps(run: dict[str, Any], ours: bool) -> str:
    """Ratios to flow matching: our cases with their bounds, or all ways at lambda 0 and 1 side by side."""
    networks = _main_networks(run)
    rows = [r for r in rows_of(run, "step") if r["network"] in networks]
    names = [
        n for n, case in CASES.items() if ours == (case.way == OURS) or n in ("lambda 0, 100 %", "lambda 1, 100 %")
    ]
    if not ours:
        names.sort(key=lambda name: CASES[name].lam)
    precisions = ("fp32", "bf16") if ours else ("fp32",)
    columns = [(n, m, p) for p in precisions for n in networks for m in ("compiled", "eager")]
    cells = crossed(rows, lambda r: r["name"], lambda r: (r["network"], r["mode"], r["precision"]))  # type: ignore
    columns = [c for c in columns if any(c in cells.get(name, {}) for name in names)]
    heads = ["step over flow matching", "bound", *(f"{n}, {m}{', bf16' if p == 'bf16' else ''}" for n, m, p in columns)]
    body = []
    for name in names:
        if name in cells:
            title = name if CASES[name].way != OURS or ours else f"**mmf_fast**, {name}"
            found = [_ratio(cells[name].get(c)) for c in columns]  # type: ignore[call-overload]
            body.append([title, f"{CASES[name].bound():.2f}", *found])
    return table(heads, body)


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    return "fails" if "error" in row else f"{row['ratio']:.2f}"


def failures(run: dict[str, Any]) -> str:
    """What the rows that fail say."""
    said: dict[str, list[str]] = {}
    for row in rows_of(run, "step"):
        if "error" in row:
            said.setdefault(row["error"], []).append(_title(row))
    return "\n".join(f"- {', '.join(titles)}: `{error[:110]}`" for error, titles in said.items())


def _title(row: Row) -> str:
    return f"{row['name']} ({row['network']}, {row['mode']}, {row['precision']})"


def memory(run: dict[str, Any]) -> str:
    cells = crossed(rows_of(run, "memory"), lambda r: r["network"], lambda r: r["name"])
    names = list(dict.fromkeys(name for row in cells.values() for name in row))
    heads = ["peak memory over flow matching, eager", *names]
    return table(heads, [[n, *(f"{row[c]['over flow matching']:.2f}" for c in names)] for n, row in cells.items()])


def accuracy(run: dict[str, Any]) -> str:
    rows = rows_of(run, "accuracy", network="DiT")
    cells = crossed(rows, lambda r: f"{r['way']}, lambda {r['lambda']:g}", lambda r: r["precision"])
    precisions = [p for p in ("fp64", "fp32", "tf32", "bf16") if any(p in row for row in cells.values())]
    heads = ["relative error, DiT", *(f"{what}, {p}" for what in ("du/dt", "gradient") for p in precisions)]
    body = [
        [name, *(_error(row.get(p), what) for what in ("du/dt", "gradient") for p in precisions)]
        for name, row in sorted(cells.items(), key=lambda item: item[0][-1])
    ]
    return table(heads, body)


def _error(row: Row | None, what: str) -> str:
    if row is None:
        return ""
    return "fails" if "error" in row else f"{row['errors'][what]:.0e}"


def kernels(run: dict[str, Any]) -> str:
    copy, product = run["machine"]["copy GB/s"], run["machine"]["product GFLOP/s"]
    body = []
    for r in rows_of(run, "kernels"):
        over = {name: f"{found['ratio']:.2f}" for name, found in r["speedup over"].items()}
        others = ", ".join(f"{ratio} ({name})" for name, ratio in over.items() if name != "composed")
        precise = "" if r["precision"] == "fp32" else f", {r['precision']}"
        name = f"{r['op']} {r['shape']}{precise}"
        body.append(
            [name, r["mode"], _time(r["seconds"]["fused"]), over["composed"], others, f"{share_of_roof(run, r):.0%}"]
        )
    roof = ", ".join([f"copy {copy:.0f} GB/s", *(f"product {rate:.0f} GFLOP/s {p}" for p, rate in product.items())])
    heads = ["operator", "pass", "time", "times as fast as composed", "as others", "share of the roof"]
    return f"{table(heads, body)}\n\nThe roof, measured in the same run: {roof}."


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def losses(run: dict[str, Any]) -> str:
    """Every row where something else is faster than ours by more than its spread."""
    found = []
    theirs = [r for r in rows_of(run, "step") if CASES[r["name"]].way != OURS and "error" not in r]
    for r in theirs:
        name = next(
            n
            for n, c in CASES.items()
            if c.way == OURS and (c.share, c.loss) == (CASES[r["name"]].share, CASES[r["name"]].loss)
        )
        same = {key: r[key] for key in ("network", "mode", "precision")}
        for ours in rows_of(run, "step", name=name, **same):
            if ours["quartiles"][0] > r["quartiles"][1]:
                found.append(f"{_title(r)}: {r['ratio']:.2f} against our {ours['ratio']:.2f}")
    for r in rows_of(run, "kernels"):
        for other, speedup in r["speedup over"].items():
            if speedup["quartiles"][1] < 1 and "no tangent" not in other:
                found.append(f"{r['op']} {r['shape']}, {r['mode']}: {speedup['ratio']:.2f} times as fast as {other}")
    for r in rows_of(run, "step"):
        if CASES[r["name"]].way == OURS and "ratio" in r and r["quartiles"][0] > 1.1 * r["bound"]:
            found.append(f"{_title(r)}: {r['ratio'] / r['bound']:.2f} times its bound")
    return "\n".join(f"- {line}" for line in found)


def _main_networks(run: dict[str, Any]) -> list[str]:
    names = dict.fromkeys(r["network"] for r in rows_of(run, "step"))
    return [n for n in names if not n.startswith("DiT, ")]


def header(run: dict[str, Any], path: Path) -> str:
    m = run["machine"]
    threads = f", {m['threads']} threads" if m["triton"] is None or "cuda" not in m["torch"] else ""
    return (
        f"{m['device']}{threads}, torch {m['torch']}, commit {m['commit'][:9]}, {m['date'][:10]}; every figure: "
        f"[{path.relative_to(ROOT)}](../{path.relative_to(ROOT)}), again by `make bench-full`."
    )


def one_device(path: Path) -> str:
    run = read(path)
    parts = [
        f"### On {'a CPU' if path.parent.name == 'cpu' else path.parent.name}",
        header(run, path),
        "A step is loss, backward and fused AdamW, timed in turn with the step of flow matching (same network and "
        "mode, PyTorch's attention); medians of the ratios. The bound counts network evaluations, a backward being 2; "
        "attention's tangent takes twice the products of attention, so FLOPs (in the file) exceed it with many tokens. "
        "100 %, 25 %: the share of samples with r < t.",
        steps(run, ours=True),
        "A ratio below 1: PyTorch's attention, which only flow matching runs, is slow there (benchmarks/LOG.md)."
        if any(r.get("ratio", 1) < 1 for r in rows_of(run, "step"))
        else "",
        "The ways of the field at equal settings (whole batch, conditional tangent), written from the descriptions of "
        "public code (benchmarks/field.py):",
        steps(run, ours=False),
        failures(run),
        f"![Overhead by method](performance_{path.parent.name}_methods.png)",
        "Errors against float64, over the same weights and draws: speed never stands without them.",
        accuracy(run),
        memory(run),
        f"![Scaling](performance_{path.parent.name}_scaling.png)",
        "<details><summary>Operators with their tangents, against the same of PyTorch's functions</summary>\n\n"
        f"{kernels(run)}\n\n![Roofline](performance_{path.parent.name}_roofline.png)\n\n</details>",
        f"Where something else is faster, or we are more than 10 % above the bound:\n\n{losses(run)}",
    ]
    return "\n\n".join(part for part in parts if part)


def runs() -> list[Path]:
    return sorted(RESULTS.glob("*/full.json"))


def section() -> str:
    found = [gpu.section(RESULTS), *map(one_device, runs())]
    return f"{BEGIN}\n" + "\n\n".join(found) + f"\n{END}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare, exit status 1 when they differ")
    check = parser.parse_args().check
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    current = before + section() + rest.split(END)[1]
    if check:
        return int(current != text)
    PAGE.write_text(current)
    for path in runs():
        draw(read(path), ROOT / "docs", path.parent.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
