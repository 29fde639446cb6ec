"""The plots of a run: overhead by method and against the share of r < t, scaling and memory, the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases import CASES, OURS
from benchmarks.results import rows_of, share_of_roof


def draw(run: dict[str, Any], folder: Path, device: str) -> None:
    """performance_<device>_{methods,scaling,roofline}.png in `folder`."""
    for name, function, size in (
        ("methods", _methods, (11, 4.2)),
        ("scaling", _scaling, (11, 3.6)),
        ("roofline", _roofline, (8, 4.5)),
    ):
        figure = Figure(figsize=size, layout="constrained")
        function(figure, run)
        figure.savefig(folder / f"performance_{device}_{name}.png", dpi=110)


def _methods(figure: Figure, run: dict[str, Any]) -> None:
    """Left: step over flow matching of each way, the first network, eager and compiled. Right: against the share."""
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    network = rows_of(run, "step")[0]["network"]
    names = [n for n, c in CASES.items() if c.share == 1 and c.lam in (0, 1)]
    names.sort(key=lambda n: (CASES[n].lam, CASES[n].way != OURS))
    for offset, mode in ((-0.2, "eager"), (0.2, "compiled")):
        found = {r["name"]: r for r in rows_of(run, "step", network=network, mode=mode, precision="fp32")}
        for y, name in enumerate(names):
            row = found.get(name, {})
            colour = {"eager": "C0", "compiled": "C1"}[mode]
            if "ratio" in row:
                low, high = row["quartiles"]
                left.barh(y + offset, row["ratio"], 0.38, color=colour, alpha=1 if CASES[name].way == OURS else 0.45)
                left.plot([low, high], [y + offset] * 2, color="black", linewidth=1)
            elif "error" in row:
                left.text(0.05, y + offset, f"{mode}: fails", va="center", fontsize=8, color=colour)
    for lam in (0, 1):
        ys = [y for y, n in enumerate(names) if CASES[n].lam == lam]
        bound = CASES[f"lambda {lam}, 100 %"].bound()
        left.plot(
            [bound, bound], [min(ys) - 0.5, max(ys) + 0.5], color="black", linestyle=":", label="bound" if lam else None
        )
    for mode, colour in (("eager", "C0"), ("compiled", "C1")):
        left.barh(0, 0, color=colour, label=mode)
    left.set_yticks(range(len(names)), [*map(_label, names)])
    left.invert_yaxis()
    left.set(xlabel="step over flow matching", title=f"{network}, all samples with r < t, fp32")
    left.legend(fontsize=8)
    for lam, colour in ((0, "C2"), (1, "C3")):
        for mode, style in (("compiled", "-o"), ("eager", "--s")):
            rows = {r["name"]: r for r in rows_of(run, "step", network=network, mode=mode, precision="fp32")}
            points = [
                (s, rows[n]["ratio"]) for s in (25, 50, 100) if "ratio" in rows.get(n := f"lambda {lam}, {s} %", {})
            ]
            right.plot(
                *zip((0, 1), *points, strict=True), style, color=colour, markersize=4, label=f"lambda {lam}, {mode}"
            )
        right.plot([0, 100], [1, CASES[f"lambda {lam}, 100 %"].bound()], color="black", linestyle=":", linewidth=1)
    right.set(xlabel="share of samples with r < t [%]", ylabel="step over flow matching", title="dotted: the bounds")
    right.legend(fontsize=8)


def _label(name: str) -> str:
    return ("mmf_fast, " if CASES[name].way == OURS else "") + name.removesuffix(", 100 %")


def _scaling(figure: Figure, run: dict[str, Any]) -> None:
    """Overhead against tokens and against width, and peak memory against tokens, as far as they were measured."""
    names = ["lambda 0, 100 %", "lambda 1, 100 %", "torch.func.jvp, lambda 0, 100 %", "torch.func.jvp, lambda 1, 100 %"]
    wanted = [
        ("step", "tokens", "ratio", "step over flow matching, eager"),
        ("step", "width", "ratio", "step over flow matching, eager"),
        ("memory", "tokens", "over flow matching", "peak memory over flow matching, eager"),
    ]
    lines: dict[tuple[str, ...], dict[str, list[tuple[float, float]]]] = {}
    for suite, kind, key, title in wanted:
        for r in rows_of(run, suite):
            if kind in r["network"] and key in r and r["name"] in names:
                point = (float("".join(filter(str.isdigit, r["network"]))), r[key])
                lines.setdefault((kind, title), {}).setdefault(r["name"], []).append(point)
    axes = figure.subplots(1, max(len(lines), 1), squeeze=False)[0]
    for ax, ((kind, title), found) in zip(axes, lines.items(), strict=False):
        for name, points in found.items():
            style = "-o" if CASES[name].way == OURS else "--s"
            colour = f"C{2 + int(CASES[name].lam)}"
            ax.plot(*zip(*sorted(points), strict=True), style, markersize=4, color=colour, label=_label(name))
        ax.set(xscale="log", xlabel=kind, ylim=(0, None))
        ax.set_title(title, fontsize=10)
        sizes = sorted({size for points in found.values() for size, _ in points})
        ax.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
        ax.set_xticks([], minor=True)
        ax.legend(fontsize=7)


def _roofline(figure: Figure, run: dict[str, Any]) -> None:
    """What operators reach of the machine: of its copy bandwidth where memory bounds them, else of its products."""
    ax: Axes = figure.subplots()
    copy, product = run["machine"]["copy GB/s"], run["machine"]["product GFLOP/s"]
    rows = rows_of(run, "kernels")
    for y, r in enumerate(rows):
        ax.barh(y, share_of_roof(run, r), color="C0" if r["bytes"] else "C1")
    ax.barh(0, 0, color="C0", label=f"of a copy, {copy:.0f} GB/s")
    ax.barh(0, 0, color="C1", label=f"of a product, {product['fp32']:.0f} GFLOP/s")
    ax.axvline(1, color="black", linestyle=":")
    ax.set_yticks(range(len(rows)), [f"{r['op']} {r['shape']}, {r['mode']}" for r in rows], fontsize=6)
    ax.invert_yaxis()
    ax.set(xlabel="share of the roof")
    ax.legend(fontsize=7, loc="lower right")
