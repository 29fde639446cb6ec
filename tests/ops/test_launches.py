"""The way of a launch up to the GPU, with a driver that only counts: how many, of how many variants, at what cost."""

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mmf_fast.ops import gpu

pytestmark = pytest.mark.skipif(not gpu.available(), reason="Triton is not installed")

SCRIPT = Path(__file__).parent.parent / "support/launch_cases.py"


@functools.cache
def cases(name):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"MMF_FAST_OPS": "triton"}
    run = subprocess.run([sys.executable, SCRIPT, name], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


# Of every kernel, the launches of one eager step: outside of the blocks, and in each block.
AROUND = {
    "sg_loss.forward_kernel": 2, "sg_loss.backward_kernel": 2,
    "pointwise.activation_kernel": 2, "layer_norm.forward_kernel": 1, "layer_norm.backward_kernel": 1,
}  # fmt: skip
BLOCK = {
    "pointwise.activation_kernel": 1, "layer_norm.forward_kernel": 2, "layer_norm.backward_kernel": 2,
    "attention_kernels.forward_kernel": 1, "attention_kernels.delta_kernel": 1, "attention_kernels.key_kernel": 1,
    "attention_kernels.query_kernel": 1,
}  # fmt: skip
THROUGH_TANGENT = {"pointwise.activation_backward_kernel": 1}  # where a gradient flows through an activation's tangent


@pytest.mark.parametrize("lam", ["0.0", "0.5"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_step_of_a_dit_launches_one_kernel_an_operator(blocks, lam):
    around, block = Counter(AROUND), Counter(BLOCK)
    if lam != "0.0":
        around.update({name: 2 * n for name, n in THROUGH_TANGENT.items()})
        block.update(THROUGH_TANGENT)
    case = cases("steps")[f"DiT, {blocks} block{'s' * (blocks > 1)}, lam {lam}"]
    assert case["launches"] == around + Counter({name: blocks * n for name, n in block.items()})


def test_depth_and_further_steps_compile_nothing_new():
    found = cases("steps")
    assert all(case["added"] == 0 and case["again"] == case["launches"] for case in found.values())
    assert found["DiT, 1 block, lam 0.0"]["variants"] <= 13
    assert found["DiT, 1 block, lam 0.5"]["variants"] <= 8  # beyond those of lambda 0
    assert [found[f"DiT, 3 blocks, lam {lam}"]["variants"] for lam in (0.0, 0.5)] == [0, 0]


@pytest.mark.parametrize("lam", ["0.0", "0.5"])
def test_a_step_of_a_unet_launches_as_many_backward_as_forward(lam):
    found = cases("steps")[f"UNet, lam {lam}"]["launches"]
    assert found["group_norm.forward_kernel"] == found["group_norm.backward_kernel"]
    kinds = {found[f"attention_kernels.{kind}_kernel"] for kind in ("forward", "delta", "key", "query")}
    assert kinds == {found["attention_kernels.forward_kernel"]}
    assert sum(found.values()) <= 110


def test_the_compiler_is_told_of_no_alignment_that_is_not_there():
    """'D': divisible by 16 bytes. Rows of odd length are copied first, a tensor at an odd address is read as it is."""
    found = {name: case[0].count("('*bf16', 'D')") for name, case in cases("layouts").items()}
    assert found == {"aligned": 8, "odd address": 2, "odd strides": 8}  # 6 operands, O and O'


def test_every_kernel_compiles_at_sizes_of_one():
    kernels = cases("ones")["launches"]
    assert len(kernels) == 12 and set(kernels.values()) == {1}


def test_a_launch_costs_the_package_little_beyond_what_it_costs_triton():
    """Building the arguments and allocating four outputs takes some four times Triton's own share of a launch."""
    found = cases("time")
    assert found["package"] < 10 * found["triton"], found
