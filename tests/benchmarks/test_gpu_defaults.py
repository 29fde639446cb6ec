"""A sweep of tiles becomes the table of defaults."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.defaults import changes, fastest, main, merged, rewritten
from mmf_fast.ops import tiles
from mmf_fast.ops.tiles import TILES, Config

A, B, C = Config(64, 64, 4, 2), Config(128, 64, 8, 2), Config(32, 32, 4, 1)


def row(config, seconds, tokens=1024, **more):
    key = {"kernel": "forward", "numbers": "16 bits", "d": 64, "batch": 2, "heads": 3, "tokens": tokens}
    return {**key, "config": list(config), **({"seconds": seconds} if seconds else {"error": "fails"}), **more}


def sweep(*rows):
    return {"machine": {"capability": [9, 0]}, "rows": list(rows)}


def entry(run):
    return fastest(run)["forward"][90, 64, "16 bits"]


def test_one_size_is_won_by_the_fastest_that_did_not_fail():
    assert entry(sweep(row(A, 2.0), row(B, 1.0), row(C, None))) == B


def test_the_mean_over_sizes_decides_among_those_measured_at_most():
    rows = [row(A, 1.0), row(B, 1.1), row(C, 0.5), row(A, 3.0, 256), row(B, 1.0, 256)]
    assert entry(sweep(*rows)) == B


def test_kernels_head_sizes_and_numbers_are_apart():
    found = fastest(sweep(row(A, 1.0), row(B, 1.0, kernel="key"), row(C, 1.0, d=72), row(B, 1.0, numbers="tf32")))
    assert found["forward"] == {(90, 64, "16 bits"): A, (90, 72, "16 bits"): C, (90, 64, "tf32"): B}
    assert found["key"] == {(90, 64, "16 bits"): B}


def test_the_module_reads_as_it_did_where_nothing_changes():
    source = Path(tiles.__file__).read_text()
    assert table_of(rewritten(source, merged(TILES, {}))) == TILES
    assert changes(TILES, {"forward": dict(TILES["forward"])}) == []


def test_what_is_written_is_what_was_found_and_nothing_else_moves():
    source = Path(tiles.__file__).read_text()
    found = fastest(sweep(row(C, 1.0), row(A, 1.0, d=72)))
    text = rewritten(source, merged(TILES, found))
    expected = {**TILES, "forward": TILES["forward"] | found["forward"]}
    assert table_of(text) == expected
    before, after = (s.split("TILES: ")[0] + s.split("\n}\n", 1)[1] for s in (source, text))
    assert before == after
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "-"],
        input=text,
        text=True,
        capture_output=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_a_module_without_a_table_is_refused():
    with pytest.raises(ValueError, match="no table TILES"):
        rewritten("TILES = None\n", TILES)


def test_the_command_prints_what_would_change(tmp_path, capsys):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(sweep(row(Config(16, 16, 2, 5), 1.0))))
    source = Path(tiles.__file__).read_text()
    assert main([str(path)]) == 0 and Path(tiles.__file__).read_text() == source
    assert capsys.readouterr().out.strip().endswith("-> 16, 16, 2, 5")


def table_of(source):
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.AnnAssign) and n.target.id == "TILES")
    return eval(compile(ast.Expression(node.value), "tiles", "eval"), {"Config": Config})
