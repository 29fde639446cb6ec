"""The tests of the operators can fail: each result of each kernel, spoilt a little, is noticed by one of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmf_fast.ops import gpu, native, overview
from mmf_fast.ops.dispatch import OPERATORS

ROOT = Path(__file__).parents[2]
FILES = {
    "attention": "test_attention.py",
    "activation": "test_pointwise.py",
    "sg_loss": "test_sg_loss.py",
}
DTYPES = {"native": ("float32", "bfloat16"), "triton": ("float32", "float16", "bfloat16")}


def mutations() -> list[tuple[str, str, int, str]]:
    """(operator, kind, place of the result, dtype) of all that a kernel here computes in such a type."""
    assert overview.DEFINED_IN  # importing them defined the operators
    found = []
    for name in OPERATORS:
        results = getattr(torch.ops.mmf_fast, name).default._schema.returns
        for kind, dtypes in DTYPES.items():
            here = (
                native.op(name)
                if kind == "native"
                else OPERATORS[name].kinds.get("triton")
                if gpu.available()
                else None
            )
            found += [(name, kind, place, dtype) for place in range(len(results)) for dtype in dtypes if here]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "place", "dtype"), mutations())
def test_a_spoilt_result_is_noticed(name: str, kind: str, place: int, dtype: str, tmp_path: Path) -> None:
    file = next((file for start, file in FILES.items() if name.startswith(start)), "test_norms.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "support.mutation", f"tests/ops/{file}"]
    environment = os.environ | {
        "MMF_FAST_MUTATE": f"{name}:{kind}:{place}:{dtype}",
        "MMF_FAST_MUTATED": str(tmp_path / "mutated"),
        "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}",
    }
    done = subprocess.run([*command, "-k", kind], cwd=ROOT, env=environment, capture_output=True, text=True)
    if not (tmp_path / "mutated").exists():
        pytest.skip(f"this result of {name} is never {dtype}")
    assert done.returncode == 1, done.stdout[-2000:]
