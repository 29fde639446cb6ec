"""Tests of the operators: every implementation runs the same bodies, with uninitialised memory filled with NaN."""

from collections.abc import Iterator

import pytest
import torch

from mmf_fast.ops import gpu, native

KINDS = ["reference", "native", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of a test; which implementation serves it is forced for the time of the test."""
    kind, cuda = request.param, torch.cuda.is_available()
    if kind == "native" and not native.available():
        pytest.skip(native.reason())
    if kind in ("triton", "cuda") and not gpu.available():
        pytest.skip("Triton is not installed")
    if kind == "cuda" and not cuda:
        pytest.skip("no CUDA device")
    if kind == "triton" and cuda:
        pytest.skip("Triton compiles here; the interpreter is for machines without a GPU")
    monkeypatch.setenv("MMF_FAST_OPS", "triton" if kind == "cuda" else kind)
    return "cuda" if kind == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty and its kin, also those of C++, return NaN: an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
