"""The GPU section of docs/performance.md, from benchmarks/results/<device>/{tests,tiles,kernels,...}.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu import PARTS
from benchmarks.results import Row, crossed, share_of_roof
from mmf_fast.planning import table

NOTHING = (
    "Nothing has been measured on a GPU yet: the Triton kernels have run in the interpreter and through the compiler "
    "only."
)
Part = dict[str, Any]


def section(results: Path) -> str:
    """One for each device that has files, or the sentence that there is none."""
    folders = sorted({path.parent for name in PARTS for path in results.glob(f"*/{name}.json")})
    return "\n\n".join(one_device(folder) for folder in folders) or f"### On a GPU\n\n{NOTHING}"


def one_device(folder: Path) -> str:
    parts = {name: json.loads(path.read_text()) for name in PARTS if (path := folder / f"{name}.json").exists()}
    machines = [part["machine"] for part in parts.values()]
    machine = machines[0]
    commits = sorted({(m["commit"][:9] or "unknown") + "+" * m["uncommitted changes"] for m in machines})
    days = sorted({m["date"][:10] for m in machines})
    copy = max(m["copy GB/s"] for m in machines)  # a part whose process others disturb sees lower limits
    product = max(m["product GFLOP/s"]["bf16"] for m in machines)
    files = ", ".join(f"[{name}](../benchmarks/results/{folder.name}/{name}.json)" for name in parts)
    said = [
        f"### On {machine['device']}",
        f"torch {machine['torch']}, Triton {machine['triton']}, power limit {machine['power limit']}, commit "
        f"{', '.join(commits)} (+: not all committed), {' and '.join(days)}; a copy reaches {copy:.0f} GB/s, a "
        f"bf16 product {product / 1e3:.0f} TFLOP/s. Every figure, and the command of each part: {files}.",
    ]
    for name, part in parts.items():
        said += [f"#### {TITLES[name]}", WRITERS[name](part), _left_out(part)]
    return "\n\n".join(text for text in said if text)


def _tests(part: Part) -> str:
    outcomes = [row.get("outcome", "failed") for row in part["rows"]]
    failed = [f"- `{row['test']}`: {row['error']}" for row in part["rows"] if "error" in row]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "skipped"))
    return "\n".join([f"{counts}.", *([""] if failed else []), *failed])


def _tiles(part: Part) -> str:
    """The fastest of each kernel, head size and length, and how many were tried."""
    rows = [row for row in part["rows"] if "error" not in row]
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.get("numbers", ""), row["kernel"], row["d"], row["tokens"]), []).append(row)
    body = []
    for (numbers, kernel, d, tokens), found in sorted(cells.items()):
        fastest = min(found, key=lambda row: row["seconds"])
        spills = str(fastest.get("spills", ""))
        tile = ", ".join(map(str, fastest["config"]))
        rate = f"{fastest['TFLOP/s']:.0f}"
        body.append([kernel, numbers, str(d), str(tokens), tile, rate, spills, str(len(found))])
    heads = ["kernel", "numbers", "head size", "tokens", "fastest: queries, keys, warps, stages", "TFLOP/s"]
    heads += ["spills", "tried"]
    return table(heads, body)


def _kernels(part: Part) -> str:
    body = []
    for row in part["rows"]:
        if "error" not in row:
            over = {name: f"{found['ratio']:.2f}" for name, found in row["speedup over"].items()}
            composed = [over.pop(name, "") for name in ("composed", "composed, compiled")]
            others = ", ".join(f"{ratio} ({name})" for name, ratio in over.items())
            rate = f"{row['FLOP/s'] / 1e12:.0f} TFLOP/s" if not row["bytes"] else f"{row['bytes/s'] / 1e9:.0f} GB/s"
            took = f"{1e3 * row['seconds']['fused']:.2f} ms"
            share = f"{share_of_roof(part, row):.0%}"
            body.append([f"{row['op']} {row['shape']}", row["mode"], took, rate, share, *composed, others])
    heads = [
        "operator",
        "pass",
        "time",
        "rate",
        "share of the roof",
        "times as fast as composed",
        "as compiled",
        "as others",
    ]
    return table(heads, body)


def _steps(part: Part) -> str:
    rows = [row for row in part["rows"] if "error" not in row]
    lines = crossed(rows, lambda r: f"{r['network']}, {r['mode']}", lambda r: r["name"])
    names = list(dict.fromkeys(row["name"] for row in rows))
    bounds = {row["name"]: row["bound"] for row in rows}
    heads = ["step over flow matching (MFU; peak memory)", *(f"{n}, bound {bounds[n]:.2f}" for n in names)]
    return table(heads, [[line, *(_step(cells.get(name)) for name in names)] for line, cells in lines.items()])


def _step(row: Row | None) -> str:
    if row is None:
        return ""
    mfu = f"{row['mfu']:.0%}; " if "mfu" in row else ""
    return f"{row['ratio']:.2f} ({mfu}{row['peak bytes'] / 2**30:.1f} GiB)"


def _imagenet(part: Part) -> str:
    body = [
        [row["launcher"], f"{row['lam']:g}", f"{row['images/s']:.0f}", f"{1e3 * row['step_seconds']:.1f} ms",
         f"{row['mfu']:.0%}" if "mfu" in row else "", f"{row['peak_memory_gib']:.1f} GiB"]
        for row in part["rows"] if "images/s" in row
    ]  # fmt: skip
    found = table(["configs/imagenet64.yaml, batch 256", "lambda", "images/s", "step", "MFU", "peak memory"], body)
    speed = [row["images/s"] for row in part["rows"] if "images/s" in row]
    if len(speed) == 2:
        found += f"\n\nA step under ZeRO-1 takes {speed[1] / speed[0]:.2f} times one without DeepSpeed."
    return found


def _profile(part: Part) -> str:
    said = []
    for row in part["rows"]:
        if "error" not in row:
            title = f"{row['network']}, {row['mode']}, {row['name']}: {1e3 * row['seconds']:.1f} ms"
            busy = f"{row['launches']:.0f} launches, the device is busy {row['busy']:.0%} of the time."
            heads = ["kernel", "launches", "ms", "share"]
            body = [
                [f"`{k['kernel'][:70]}`", f"{k['launches']:.0f}", f"{1e3 * k['seconds']:.2f}", f"{k['share']:.0%}"]
                for k in row["kernels"][:10]
            ]
            said.append(f"{title}, {busy}\n\n{table(heads, body)}")
    return "\n\n".join(said)


TITLES = {
    "tests": "Tests",
    "tiles": "Tiles of the attention kernels",
    "kernels": "Operators",
    "steps": "Training steps",
    "imagenet": "The ImageNet recipe on one GPU",
    "profile": "What a step's time goes to",
}
WRITERS = {
    "tests": _tests,
    "tiles": _tiles,
    "kernels": _kernels,
    "steps": _steps,
    "imagenet": _imagenet,
    "profile": _profile,
}


def _left_out(part: Part) -> str:
    """What failed, once for each reason, and whether the part was ended before it was complete."""
    said: dict[str, int] = {}
    for row in part["rows"]:
        if "error" in row and part["part"] != "tests":
            said[row["error"]] = said.get(row["error"], 0) + 1
    lines = [f"- {count} failed: `{error[:110]}`" for error, count in said.items()]
    if part["ended"] != "complete":
        lines.append(f"- not complete: {part['ended'] or 'the part died'}")
    return "\n".join(lines)
