"""Every Triton kernel, in the configurations its launcher would use, compiles for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmf_fast.ops import gpu

pytestmark = pytest.mark.skipif(not gpu.available(), reason="Triton is not installed")

GATE = Path(__file__).parent.parent / "support/compile_gate.py"
TENSOR_MEMORY = 512  # columns of a Blackwell multiprocessor; what asks for more is never launched

# Kernels of which every tile that fits spills in its loop or computes products twice and more: the key kernel sums four
# gradients as wide as a head, and tf32 numbers take twice the registers. At most so many instructions of the loops.
CROWDED = {("key_kernel", "16 bits", 96): 80, ("key_kernel", "tf32", 72): 270, ("query_kernel", "tf32", 72): 140}

# Tiles that a GPU preferred to all that spill nothing, with what their loops spill: benchmarks/results/h200/tiles.json.
MEASURED = {("key_kernel", "sm_90a", 72, (32, 128, 8, 2)): 80}  # 255 TFLOP/s; the best of those without 184


@pytest.mark.parametrize(
    "options",
    [[], pytest.param(["--all"], marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
    ids=["defaults", "all"],
)
def test_every_kernel_compiles_for_every_chip_and_fits(options):
    """Products on tensor cores, none of them for nothing; no spills where the time is spent; memory that a chip has."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"MMF_FAST_OPS": "triton"}
    run = subprocess.run([sys.executable, GATE, *options], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    first, *results = (json.loads(line) for line in run.stdout.splitlines())
    assert first == {"missing": []}, "kernels that compile_gate.call_operators does not reach"
    assert {r["chip"] for r in results} == {"sm_80", "sm_90a", "sm_100a"}
    assert len({r["kernel"] for r in results}) >= 12
    assert {r["constants"]["D"] for r in results if r["executed"]} >= {64, 72}
    assert {r["constants"]["WHOLE"] for r in results if "group_norm" in r["kernel"]} == {False, True}
    wrong = [
        f"{what}: {r['kernel']} for {r['chip']}, {r['constants']}, {r['options']}"
        for r in results
        for what in faults(r)
    ]
    assert not wrong, "\n".join(wrong)


def faults(r):
    """What is wrong with one compiled kernel."""
    if r["shared"] > r["shared_limit"]:
        yield f"{r['shared']} bytes of shared memory, of {r['shared_limit']}"
    if r["tensor_memory"] > TENSOR_MEMORY and not r["default"]:
        return  # Triton refuses to launch it, and tuning passes over it
    if r["tensor_memory"] > TENSOR_MEMORY:
        yield f"{r['tensor_memory']} columns of tensor memory, of {TENSOR_MEMORY}"
    if r["matmul"] and not r["tensor_cores"]:
        yield "no tensor-core instruction"
    tiles = 1 + sum(r["constants"].get(name, False) for name in ("HAS_DX", "HAS_G", "HAS_H"))
    if r["constants"].get("WHOLE") and r["loads"] != tiles:
        yield f"{r['loads']} loads of {tiles} tensors, though one tile holds a group"
    if not r["default"]:
        return
    kernel, c, o = r["kernel"].rpartition(".")[2], r["constants"], r["options"]
    numbers = "tf32" if c.get("PRECISION") == "tf32" else "16 bits"
    tile = c.get("BLOCK_M"), c.get("BLOCK_N"), o.get("num_warps"), o.get("num_stages")
    allowed = CROWDED.get((kernel, numbers, c.get("D")), 0) or MEASURED.get((kernel, r["chip"], c.get("D"), tile), 0)
    if r["matmul"] and r["spills_in_loops"] > allowed:
        yield f"{r['spills_in_loops']} instructions of the inner loops spill registers"
    limited = c.get("WHOLE") and r["chip"] == "sm_100a"  # where ptxas 13.1 keeps float32 to 64 registers
    if not r["matmul"] and r["spills"] > (16 if limited else 0):  # once, since what one tile holds has no loop
        yield f"{r['spills']} bytes of register spills"
    tuned = numbers == "16 bits" or c.get("D", 0) <= 72  # wider heads of TF32 have kept their old tiles
    if r["executed"] is not None and tuned and not 0.99 <= r["executed"] <= 1.15:  # below 1: the count misses products
        yield f"{r['executed']:.2f} times the products of the formulas"
    if r["serialized"] and c.get("MASK") == "none":  # a boolean mask is read between the products
        yield "the assembler runs its products one after another"
