"""Every Triton kernel, in the configurations its launcher would use, compiles for GPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest
from support.launch import SUPPORT

from mmf_fast.ops import gpu

pytestmark = pytest.mark.skipif(not gpu.available(), reason="Triton is not installed")


@pytest.mark.parametrize(
    "options",
    [[], pytest.param(["--all"], marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
    ids=["defaults", "all"],
)
def test_every_kernel_compiles_for_every_chip_and_fits(options):
    """No spills in a default configuration, shared memory within the chip's limit, matrix products on tensor cores."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"MMF_FAST_OPS": "triton"}
    script = SUPPORT / "compile_gate.py"
    run = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    first, *results = (json.loads(line) for line in run.stdout.splitlines())
    assert first == {"missing": []}, "kernels that compile_gate.call_operators does not reach"
    assert {r["chip"] for r in results} == {"sm_80", "sm_90a", "sm_100a"}
    assert len({r["kernel"] for r in results}) >= 13
    for r in results:
        where = f"{r['kernel']} for {r['chip']}, {r['constants']}, {r['options']}"
        assert not (r["default"] and r["spills"]), f"{r['spills']} bytes of register spills: {where}"
        assert r["shared"] <= r["shared_limit"], f"{r['shared']} bytes of shared memory: {where}"
        assert r["tensor_cores"] or not r["matmul"], f"no tensor-core instruction: {where}"
