"""Comparing runs and writing the report, from a run made by hand."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.compare import compare, main, worse
from benchmarks.plots import draw
from benchmarks.results import read

ROOT = Path(__file__).parents[2]


def step(name, ratio, mode="eager", network="DiT", **more):
    return {
        **{"suite": "step", "network": network, "mode": mode, "precision": "fp32", "name": name, "bound": 1.3},
        **({"ratio": ratio, "quartiles": [0.99 * ratio, 1.01 * ratio]} if ratio else {}),
        **more,
    }


def kernel(op, ratio):
    found = {"composed": {"ratio": ratio, "quartiles": [0.98 * ratio, 1.02 * ratio]}}
    return {
        **{"suite": "kernels", "op": op, "shape": "(2, 3)", "mode": "dual", "precision": "fp32", "bytes": 100},
        **{"bytes/s": 5e9, "FLOP/s": 0.0, "seconds": {"fused": 1e-3}, "speedup over": found},
    }


@pytest.fixture
def run():
    rows = [
        step("lambda 0, 100 %", 1.4),
        step("lambda 1, 100 %", 2.1),
        step("lambda 0, 100 %", 1.3, "compiled"),
        step("torch.func.jvp, lambda 0, 100 %", 1.2),
        step("torch.func.jvp, lambda 1, 100 %", None, "compiled", error="RuntimeError: ZeroTensors are immutable"),
        step("lambda 0, 100 %", 1.25, network="DiT, 64 tokens"),
        {"suite": "memory", "network": "DiT, 64 tokens", "name": "lambda 0, 100 %", "over flow matching": 1.01},
        *(
            {**{"suite": "accuracy", "network": "DiT", "precision": "fp32", "way": "mmf_fast", "lambda": lam},
             "errors": {"du/dt": 2e-7, "gradient": 3e-7}}
            for lam in (0.0, 1.0)
        ),
        kernel("sg_loss", 2.5),
        kernel("activation", 0.8),
    ]  # fmt: skip
    machine = {"device": "a chip", "threads": 2, "triton": None, "torch": "2.13", "commit": "0" * 40}
    machine |= {"date": "2026-01-01T00:00", "copy GB/s": 10.0, "product GFLOP/s": {"fp32": 100.0}}
    return {"machine": machine, "rows": rows}


def write(run, path):
    """As pytest-benchmark does."""
    rows = [
        {"fullname": f"benchmarks/test_{row['suite']}.py::test", "params": None,
         "extra_info": {key: value for key, value in row.items() if key != "suite"}}
        for row in run["rows"]
    ]  # fmt: skip
    path.write_text(json.dumps({"machine_info": run["machine"], "run": {}, "benchmarks": rows}))


def test_the_same_run_has_no_change(run):
    rows = compare(run, run)
    assert len(rows) == 8 and not any(worse(old, new) for _, old, new in rows)


@pytest.mark.parametrize(
    ("what", "factor", "spread", "failed"),
    [
        ("ratio", 1.10, 0.01, True),  # a slower step
        ("ratio", 1.04, 0.01, False),  # within 5 %
        ("ratio", 0.80, 0.01, False),  # faster
        ("ratio", 1.10, 0.20, False),  # within its spread
        ("speedup", 0.80, 0.01, True),  # an operator that lost speed
        ("speedup", 1.20, 0.01, False),
    ],
)
def test_only_what_got_worse_beyond_its_spread_fails(run, tmp_path, capsys, what, factor, spread, failed):
    new = copy.deepcopy(run)
    row = new["rows"][0 if what == "ratio" else -2]
    found = row if what == "ratio" else row["speedup over"]["composed"]
    found["ratio"] *= factor
    found["quartiles"] = [found["ratio"] * (1 - spread), found["ratio"] * (1 + spread)]
    for name, each in (("old", run), ("new", new)):
        write(each, tmp_path / name)
    assert main([str(tmp_path / "old"), str(tmp_path / "new")]) == int(failed)
    assert ("WORSE" in capsys.readouterr().out) == failed


def test_files_that_do_not_compare(run, tmp_path, capsys):
    write(run, tmp_path / "a")
    write(run | {"rows": []}, tmp_path / "b")
    (tmp_path / "c").write_text(json.dumps(run))
    for other, words in (("b", "share no case"), ("c", "lacks 'benchmarks'"), ("none", "No such file")):
        assert main([str(tmp_path / "a"), str(tmp_path / other)]) == 2
        assert words in capsys.readouterr().err


def test_the_report_says_what_fails_and_where_we_lose(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    path = tmp_path / "cpu" / "full.json"
    path.parent.mkdir()
    write(run, path)
    text = report.one_device(path)
    assert "| lambda 0, 100 % | 1.33 | 1.30 | 1.40 |" in text
    assert "| torch.func.jvp, lambda 1, 100 % | 2.00 | fails |  |" in text and "ZeroTensors are immutable" in text
    assert "- torch.func.jvp, lambda 0, 100 % (DiT, eager, fp32): 1.20 against our 1.40" in text
    assert "- activation (2, 3), dual: 0.80 times as fast as composed" in text
    assert "| activation (2, 3) | dual | 1.00 ms | 0.80 |  | 50% |" in text
    assert "| mmf_fast, lambda 1 | 2e-07 | 3e-07 |" in text
    assert "| DiT, 64 tokens | 1.01 |" in text


def test_the_rounds_of_pytest_benchmark_are_those_that_were_measured(tmp_path):
    """A run of one case: its file is pytest-benchmark's, read as rows, and compares with itself."""
    path = tmp_path / "run.json"
    case = "benchmarks/test_kernels.py::test_kernel[activation gelu_tanh (32, 64, 1024) | dual | fp32]"
    options = ["--benchmark-only", "--length", "0", f"--benchmark-json={path}", "-p", "no:cacheprovider"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not a worker
    command = [sys.executable, "-m", "pytest", case, *options]
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    (each,) = json.loads(path.read_text())["benchmarks"]
    (row,) = read(path)["rows"]
    assert each["stats"]["rounds"] == row["rounds"] >= 2
    assert each["stats"]["median"] == pytest.approx(row["seconds"]["fused"])
    assert row["suite"] == "kernels" and read(path)["machine"]["copy GB/s"] > 0
    assert main([str(path), str(path)]) == 0


def test_every_plot_is_drawn(run, tmp_path):
    draw(run, tmp_path, "cpu")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"performance_cpu_{name}.png" for name in ("methods", "scaling", "roofline")
    }
